"""The sandbox: where an answer that is code runs."""
