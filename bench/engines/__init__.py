"""Other people's engines, measured by the same ruler as HAVOC's artifacts.

`engine` is the child that times; each engine is one file beside it with `PACKAGE` and `open_model`. Neither imports
HAVOC, so that an engine may live in an environment of its own.
"""

from __future__ import annotations

from typing import Final

ENGINES: Final = {
    "llama_cpp": "llama.cpp",
    "genai": "onnxruntime-genai",
    "openvino": "OpenVINO",
    "hugging_face": "transformers",
}
"""The engines there is a file for, and what people call them."""


def key_of(shown: str) -> str:
    """The name of an engine's file by what people call it."""
    return next((key for key, name in ENGINES.items() if name == shown), shown)
