"""Asks a server with OpenAI's routes whether it applies an adapter, by the adapter's certificate."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_lora.checked import number
from lightning_lora.errors import BaseMismatchError, ConfigError
from lightning_lora.format.certificate import BEST, SAME, Certificate, Distances, Prompt, read_certificate

_MEANING = {
    "same": "it applies the adapter",
    "ignored": "it answers as the base does: the adapter is not applied",
    "scaled": "it changes the base as the adapter does, by another amount: another scale, or a part of the adapter",
    "another": "its answers are neither the adapter's nor the base's: another adapter, another base, or other prompts",
}
_REFUSES = (400, 404, 405, 422, 501)
_NOBODY = "a-name-that-no-model-has"
_ROUTES = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True)
class ServerReport:
    """How a server answers the prompts of a certificate."""

    server: str
    name: str | None
    """The model that was asked for."""
    route: str
    """The route that gave log-probabilities."""
    distances: Distances
    base: Distances | None
    """The distances of the answers under the base's name, if that was given."""
    is_base: bool
    """True if the adapter's name and the base's name gave the same numbers."""
    any_name: bool = False
    """True if the server answers to any name, as llama.cpp's does: the base's name was not asked for then."""

    @property
    def verdict(self) -> str:
        """ "same", "ignored", "scaled" or "another"."""
        return "ignored" if self.is_base else self.distances.verdict

    @property
    def ok(self) -> bool:
        """True if the server applies the adapter."""
        return self.verdict == "same"

    def __str__(self) -> str:
        d = self.distances
        lines = [
            f"{self.server} ({self.route}), model {self.name or 'of its own choice'}",
            f"distance from the adapter's answers: {d.adapter:.3f} (at most {SAME:g} is the same), from the base's: "
            f"{d.base:.3f}",
        ]
        if self.base is not None and self.base.base > SAME:
            lines.append(f"note: under the base's name it is {self.base.base:.3f} from the base: is it the same base?")
        if self.any_name:
            lines.append("note: it answers to any name, so the base's name shows nothing, and was not asked for")
        scale = f"; about x {d.scale:.2g}" if self.verdict == "scaled" else ""
        return "\n".join([*lines, f"{self.verdict}: {_MEANING[self.verdict]}{scale}"])


def verify_server(
    server: str,
    adapter: str | os.PathLike[str],
    *,
    name: str | None = None,
    base_name: str | None = None,
    api_key: str | None = None,
    timeout: float = 60.0,
) -> ServerReport:
    """Ask a server for the next token of each prompt in an adapter's certificate, and compare its log-probabilities.

    Any server with OpenAI's /v1/completions or /v1/chat/completions will do, if it gives log-probabilities: vLLM,
    llama.cpp's, LoRAX, ... Another seed of the same training is not told from the adapter.

    Args:
        server: Its address, such as "http://localhost:8000".
        adapter: The adapter's folder, which has a certificate (`make_certificate`).
        name: The name under which the server knows the adapter. None names no model: for servers that have only one.
        base_name: The base's name there. Its answers show an adapter that is ignored also on another base. A server
            that answers to any name is not asked for it.
        api_key: For servers that ask for one.
        timeout: Seconds for each request.

    Returns:
        A report with a verdict: "same", "ignored", "scaled" or "another".

    Raises:
        AdapterFormatError: There is no certificate, or it is damaged or another adapter's.
        BaseMismatchError: The certificate was made on another base; or the server's tokens are none of its tokens.
        ConfigError: The server cannot be reached, does not know the name, or gives no log-probabilities.
    """
    number("timeout", timeout, least=0)
    certificate = read_certificate(adapter)
    if not isinstance(server, str) or not server.startswith(("http://", "https://")):
        raise ConfigError(f"server={server!r} is no address. Give one that starts with http:// or https://.")
    client = _Client(server.rstrip("/").removesuffix("/v1"), api_key, timeout)
    answers = client.answers(certificate, name)
    any_name = base_name is not None and client.knows(_NOBODY, certificate.prompts[0])
    of_base = None if base_name is None or any_name else client.answers(certificate, base_name)
    return ServerReport(
        server=server,
        name=name,
        route=client.route,
        distances=certificate.compare(answers),
        base=None if of_base is None else certificate.compare(of_base),
        is_base=answers == of_base,
        any_name=any_name,
    )


class _Client:
    def __init__(self, server: str, api_key: str | None, timeout: float) -> None:
        self.server, self.api_key, self.timeout = server, api_key, timeout
        # llama.cpp's server keeps what it computed for a prompt, also when another adapter is set: it is told to
        # compute it anew. Servers that refuse fields that they do not know are asked without that one.
        self.ways = [(route, fields) for route in _ROUTES for fields in ({"cache_prompt": False}, {})]
        """(route, further fields of a request); the first is the one in use, those before it were refused."""

    @property
    def route(self) -> str:
        return self.ways[0][0]

    def answers(self, certificate: Certificate, name: str | None) -> list[dict[int, float]]:
        """For each prompt, token -> log-probability of the likeliest next tokens."""
        found = [self._best(prompt, name) for prompt in certificate.prompts]
        if not any(id >= 0 for one in found for id in one):
            raise BaseMismatchError(
                f"{self.server} answers with none of the tokens in the certificate: its base has another vocabulary."
            )
        return found

    def knows(self, name: str, prompt: Prompt) -> bool:
        """True if the server answers under that name."""
        try:
            self._ask(prompt, name)
        except (_RefusedError, ConfigError):
            return False
        return True

    def _best(self, prompt: Prompt, name: str | None) -> dict[int, float]:
        refused: dict[str, _RefusedError] = {}
        while True:
            try:
                return self._ask(prompt, name)
            except _RefusedError as error:
                refused[self.route] = error
                if len(self.ways) == 1:
                    said = "; ".join(f"{route}: {error}" for route, error in refused.items())
                    raise ConfigError(f"{self.server} gives no log-probabilities: {said}") from None
                del self.ways[0]

    def _ask(self, prompt: Prompt, name: str | None) -> dict[int, float]:
        route, fields = self.ways[0]
        if route == _ROUTES[0]:  # as tokens, so that no server adds another beginning of the text
            asked: dict[str, Any] = {"prompt": list(prompt.ids), "logprobs": BEST}
        else:
            asked = {"messages": [{"role": "user", "content": prompt.text}], "logprobs": True, "top_logprobs": BEST}
        common = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "seed": 0, **({"model": name} if name else {})}
        return _by_id(_likeliest(self._post({**asked, **common, **fields})), prompt)

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.server + self.route, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:300]
            what = f"status {error.code}: {said or error.reason}"
            if error.code in _REFUSES:
                raise _RefusedError(what) from None
            raise ConfigError(f"{self.server}{self.route} answers with {what}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ConfigError(
                f"{self.server}{self.route} gives no answer that can be read: {error}. Is it an OpenAI-like server, "
                "and is it running?"
            ) from error


class _RefusedError(Exception):
    """The server does not do this on that route."""


def _likeliest(answer: Any) -> list[tuple[int | None, str, float]]:
    """(id if it is said, text, log-probability) of the likeliest next tokens, in either of OpenAI's two layouts."""
    try:
        said = answer["choices"][0]["logprobs"]
        if said.get("content"):
            first = said["content"][0]
            entries = first.get("top_logprobs") or first["top_probs"]
            return [(e.get("id"), str(e["token"]), float(e["logprob"])) for e in entries]
        best = said["top_logprobs"][0]
        return [(int(t[9:]) if t.startswith("token_id:") else None, t, float(value)) for t, value in dict(best).items()]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise _RefusedError(f"no log-probabilities in {json.dumps(answer)[:200]} ({error!r})") from None


def _by_id(best: list[tuple[int | None, str, float]], prompt: Prompt) -> dict[int, float]:
    """The log-probabilities by the certificate's tokens; others get numbers below zero."""
    known = {c.id for c in prompt.best}
    texts = {name: c.id for c in prompt.best for name in (c.text.strip(), c.piece, c.text) if name}
    found: dict[int, float] = {}
    for place, (id, text, value) in enumerate(best):
        if id is None:
            id = texts.get(text, texts.get(text.strip(), -1 - place))
        found[id if id in known or id < 0 else -1 - place] = value
    return found
