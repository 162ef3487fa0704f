"""llama.cpp: a `.gguf` file in a server inside this process (xllamacpp), or any llama-server by its address.

Both use HTTP at llama-server's `/completion`: token ids are sent, and each token comes back as an event. A token that
ends inside a character is sent together with the next one: its id is lost, and it counts as `UNTOLD`.
"""

from __future__ import annotations

import http.client
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "xllamacpp"
_TIMEOUT_S = 120.0  # for the next event of an answer
_MAX_LINE_BYTES = 1 << 20
UNTOLD = -1
_BIAS = 1e4  # changes the token that the server writes, not the probabilities that it reports
_LEAST = -100.0


class LlamaServer:
    """A llama-server that answers at `address`."""

    def __init__(self, address: str, *, is_own_process: bool, server: Any = None) -> None:  # noqa: ANN401
        self._address = urlsplit(address)
        self._server = server  # the server ends when the last reference is gone
        self.is_own_process = is_own_process
        self._told: int | None = None  # the id of a reported token

    def generate(self, ids: list[int], num_tokens: int) -> Iterator[int]:
        """Yield greedy tokens as their events arrive; a prompt from the server's cache is an error."""
        asked = {
            "prompt": ids,
            "n_predict": num_tokens,
            "temperature": 0,
            "cache_prompt": False,
            "ignore_eos": True,
            "return_tokens": True,
            "stream": True,
        }
        with self._answer("POST", "/completion", json.dumps(asked)) as response:
            num_told = 0
            for event in _events(response):
                told = event.get("tokens", [])
                num_untold = event.get("tokens_predicted", num_told + len(told)) - num_told - len(told)
                yield from [UNTOLD] * num_untold + told
                num_told += max(num_untold, 0) + len(told)
                if event.get("stop"):
                    _require_whole_prompt(event, len(ids))
                    return

    def next_logits(self, ids: list[int], num_ids: int) -> list[float] | None:
        """Log-probabilities of the next token [V], as the server reports them with the token that it writes.

        It reports none with a token that ends inside a character: then it is asked again and must write another one.
        """
        asked = {"prompt": ids, "n_predict": 1, "n_probs": num_ids, "temperature": 0, "cache_prompt": False}
        asked |= {"ignore_eos": True, "post_sampling_probs": False}
        for favoured in (None,) if self._told is None else (None, self._told):
            biased = {} if favoured is None else {"logit_bias": [[favoured, _BIAS]]}
            with self._answer("POST", "/completion", json.dumps(asked | biased)) as response:
                told = json.loads(response.read()).get("completion_probabilities")
            if told:
                self._told = told[0]["id"]
                return _in_order(told[0]["top_logprobs"], num_ids)
        return None

    def require_health(self) -> None:
        """Raise if nothing answers at the address, or if the server is not ready."""
        with self._answer("GET", "/health") as response:
            response.read()

    @contextmanager
    def _answer(self, method: str, path: str, body: str | None = None) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._address.netloc, timeout=_TIMEOUT_S)
        try:
            where = self._address.path.rstrip("/") + path
            connection.request(method, where, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                said = response.read(300).decode(errors="replace")
                raise RuntimeError(f"the server answers {response.status}: {said}")
            yield response
        finally:
            connection.close()


def _in_order(told: list[dict[str, Any]], num_ids: int) -> list[float]:
    """Log-probabilities by id; a token that the server leaves out gets a probability of almost 0."""
    found = [_LEAST] * num_ids
    for entry in told:
        if 0 <= entry["id"] < num_ids:
            found[entry["id"]] = max(float(entry["logprob"]), _LEAST)
    return found


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the JSON documents of a stream of server-sent events."""
    while line := response.readline(_MAX_LINE_BYTES):
        if line.startswith(b"data: "):
            document = json.loads(line[6:])
            if "error" in document:
                raise RuntimeError(f"the server answers {str(document['error'])[:300]}")
            yield document


def _require_whole_prompt(event: dict[str, Any], num_ids: int) -> None:
    num_read = event.get("timings", {}).get("prompt_n", num_ids)
    if num_read != num_ids:
        raise RuntimeError(f"the server read {num_read} of {num_ids} prompt tokens; the others came from its cache")


def prepare() -> None:
    """Import the package before the clock starts, so the time of loading a model does not include it."""
    import xllamacpp  # noqa: F401


def open_model(path: str, *, num_threads: int, capacity: int) -> LlamaServer:
    """Open a file, or use the server at an address, which has its own threads and context."""
    if "://" in path:
        model = LlamaServer(path, is_own_process=False)
        model.require_health()
        return model
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = os.fspath(path)
    params.n_ctx = capacity
    params.n_parallel = 1
    params.n_batch = params.n_ubatch = max(capacity, 512)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    params.n_gpu_layers = 0
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.verbosity = 0
    server = xllamacpp.Server(params)
    return LlamaServer(server.listening_address, is_own_process=True, server=server)
