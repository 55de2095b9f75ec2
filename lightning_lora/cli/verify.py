"""Prove that an adapter is applied: layer by layer in a model, or by the answers of a server.

lightning-lora verify adapter=FOLDER model=./base model.dtype=bfloat16    loads it there, and says what survives
lightning-lora verify adapter=FOLDER model=./merged base=./base           a model into which it was merged
lightning-lora verify adapter=FOLDER model=./base make=true               writes the certificate that a server needs
lightning-lora verify adapter=FOLDER server=http://localhost:8000 name=my-adapter base_name=base

It prints what it measured, and exits with 1 if the adapter is not applied as its files say. A certificate is what base
and adapter answer to a few common words. It lies beside the card, and is not pushed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.cli.results import shown
from lightning_lora.cli.settings import Node, base_folder, build
from lightning_lora.errors import ConfigError, listed

if TYPE_CHECKING:
    from lightning_lora.analysis.served import ServerReport
    from lightning_lora.hub.verify import VerifyReport


@dataclass(frozen=True)
class Settings:
    """The top-level keys of the configuration."""

    adapter: str
    model: Node
    base: str | None
    revision: str | None
    subfolder: str | None
    ignore_fields: list[str]
    check_base: bool
    make: bool
    server: str | None
    name: str | None
    base_name: str | None
    api_key: str | None
    timeout: float


def run(settings: dict[str, Any]) -> None:
    """Verify as `settings` say, and print the report. Raises SystemExit(1) if the adapter is not applied."""
    from lightning_lora.format.folder import check_folder
    from lightning_lora.hub.pull import adapter_folder

    options = {name: settings[name] for name in ("subfolder", "ignore_fields")}
    folder = adapter_folder(settings["adapter"], settings["revision"], **options)
    check_folder(folder)
    report = _of_model(settings, folder) if settings["server"] is None else _of_server(settings, folder)
    print(report)
    if not report.ok:
        raise SystemExit(1)


def _of_model(settings: dict[str, Any], folder: Path) -> VerifyReport:
    from lightning_lora.analysis.certificate import make_certificate
    from lightning_lora.cli.merged_model import loaded_base, named_base
    from lightning_lora.format.folder import read_config
    from lightning_lora.hub import load_adapter
    from lightning_lora.hub.verify import verify_adapter

    for key in ("name", "base_name", "api_key"):
        if settings[key] is not None:
            raise ConfigError(f"{key}={settings[key]!r} is for a server, and there is no server=.")
    if settings["make"] and settings["base"] is not None:
        raise ConfigError("make=true makes a certificate from the base, as model=; base= is for a merged model.")
    config = read_config(folder)
    source = build(settings, "model") if settings["model"] is not None else named_base(config, folder)
    model = loaded_base(source, config, folder)
    checks = {"ignore_fields": settings["ignore_fields"], "check_base": settings["check_base"]}
    if settings["base"] is None:
        load_adapter(model, folder, **checks)
    report = verify_adapter(model, folder, base=base_folder(settings["base"]), **checks)
    if settings["make"] and report.ok:
        certificate = make_certificate(model, source.tokenizer(), folder)
        print(f"certificate: {shown(certificate.write(folder))}")
    return report


def _of_server(settings: dict[str, Any], folder: Path) -> ServerReport:
    from lightning_lora.analysis.served import verify_server

    given = [key for key in ("model", "base") if settings[key] is not None] + ["make"] * settings["make"]
    if given:
        raise ConfigError(f"{listed(given)} and server= exclude each other: a server has its model.")
    asked = {name: settings[name] for name in ("name", "base_name", "api_key", "timeout")}
    return verify_server(settings["server"], folder, **asked)
