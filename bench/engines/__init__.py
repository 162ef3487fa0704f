"""Other people's engines, measured by the same ruler as HAVOC's artifacts.

`engine` is the child that times; each engine is one file beside it with `PACKAGE` and `open_model`. Neither imports
HAVOC, so that an engine may live in an environment of its own.
"""
