"""llama.cpp itself: its converters and its runtime, from the sdist of llama-cpp-python, built once into a cache folder.

`python -m tests.rewriting.llama_cpp` (make test-llama) builds it in some minutes, or says why it cannot.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

VERSION = "0.3.36"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning-lora-tests" / "llama.cpp"
BINDINGS = CACHE / f"llama_cpp_python-{VERSION}"
SOURCE = BINDINGS / "vendor" / "llama.cpp"
LIBRARY = BINDINGS / "build" / "bin" / "libllama.so"
SERVER = LIBRARY.parent / "llama-server"
ABSENT = "llama.cpp is not built: make test-llama does, where there are a C++ compiler and a network"

OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    **dict.fromkeys(("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES"), "OFF"),
    # The server's web page would come from a network.
    **dict.fromkeys(("LLAMA_BUILD_APP", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI"), "OFF"),
    **dict.fromkeys(("LLAMA_BUILD_TOOLS", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_COMMON"), "ON"),
    **dict.fromkeys(("GGML_OPENMP", "GGML_LLAMAFILE"), "OFF"),
}
PRELOADED = [
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.tokenization_auto",
    "safetensors.torch",
    "torch._dynamo",
]
"""What takes seconds to import, and is the same for every call."""


class LlamaError(Exception):
    """A converter or the runtime gave up; the text is what it printed last."""


def build() -> None:
    """Build the library and the server, where they are not built. Raises LlamaError where that cannot be."""
    if LIBRARY.exists() and SERVER.exists():
        return
    if sys.platform != "linux":
        raise LlamaError("the build is written for Linux")
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        raise LlamaError("there is no C++ compiler here")
    if not SOURCE.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            wanted = ["--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}"]
            _call(sys.executable, "-m", "pip", "download", *wanted, "--dest", folder)
            with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as sdist:
                sdist.extractall(folder, filter="data")
            os.rename(Path(folder) / BINDINGS.name, BINDINGS)
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    _call("cmake", "-S", str(SOURCE), "-B", str(BINDINGS / "build"), "-G", "Ninja", *options)
    _call("cmake", "--build", str(BINDINGS / "build"), "--target", "llama", "llama-server")


def _call(*command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    program = shutil.which(command[0], path=path)
    if program is None:
        raise LlamaError(f"there is no {command[0]} here")
    try:
        done = subprocess.run(
            [program, *command[1:]], env=environment, capture_output=True, text=True, errors="replace", timeout=7200
        )
    except subprocess.TimeoutExpired as error:
        raise LlamaError(f"{command[0]} took more than {error.timeout:.0f} seconds") from error
    if done.returncode:
        raise LlamaError(
            f"{' '.join(command[:3])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}"
        )


def convert(model: Path, gguf: Path | None = None, kind: str = "f32") -> Path:
    """The model that transformers saved in the folder `model`, as a GGUF with matrices of that kind."""
    gguf, words = gguf or model.with_suffix(".gguf"), model / "tokenizer.json"
    if not words.exists():  # the converter of Gemma 3 counts the words in it
        size = json.loads((model / "config.json").read_text())["vocab_size"]
        words.write_text(json.dumps({"model": {"vocab": list(range(size))}, "added_tokens": []}))
    _in_a_process(_script, "convert_hf_to_gguf.py", str(model), "--outtype", kind, "--outfile", str(gguf))
    return gguf


def convert_adapter(adapter: Path, base: Path) -> Path:
    """The adapter in the folder `adapter` as a GGUF of float32; `base` is the folder of its model."""
    gguf = adapter.with_suffix(".gguf")
    _in_a_process(_script, "convert_lora_to_gguf.py", str(adapter), "--base", str(base), "--outfile", str(gguf))
    return gguf


def logits(model: Path, tokens: list[int], adapter: Path | None = None) -> np.ndarray:
    """(tokens, vocabulary): what the runtime computes, on one thread, with keys and values in float32."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        _in_a_process(_run, str(model), adapter and str(adapter), tokens, str(out))
        return np.load(out)


@contextmanager
def serving(model: Path, *options: str) -> Iterator[str]:
    """llama.cpp's own server on loopback, with one thread; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(SERVER), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-c", "512", "-np", "1"]
    command += ["-t", "1", "-tb", "1", "--no-warmup", *options]
    address = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "GGML_NO_BACKTRACE": "1"})
        try:
            _wait_until_ready(process, address, Path(log.name))
            yield address
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=10):
                return
        except OSError:  # not listening yet, or status 503 while it loads the model
            time.sleep(0.2)
    raise LlamaError(f"the server is not ready (status {process.poll()}):\n{log.read_text(errors='replace')[-2000:]}")


def _in_a_process(work: Callable[..., None], *arguments: Any) -> None:
    """The runtime may abort the process that it is in, and the converters end theirs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.NamedTemporaryFile("w+", errors="replace") as log:
        process = context.Process(target=_logged, args=(log.name, work, *arguments))
        process.start()
        process.join(600)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode:
            said = log.read().strip().splitlines()
            raise LlamaError(f"{work.__name__} {arguments[0]} ended with {process.exitcode}:\n" + "\n".join(said[-30:]))


def _logged(log: str, work: Callable[..., None], *arguments: Any) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work(*arguments)


def _script(name: str, *arguments: str) -> None:
    sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]
    sys.argv = [name, *arguments]
    import conversion

    of_name = conversion.get_model_class

    def without_words(*arguments: Any, **options: Any) -> Any:
        """The converter's class for a model, but for its tokenizer: what is compared starts from tokens."""
        own = of_name(*arguments, **options)
        own.set_vocab = lambda self: (
            self._set_vocab_none(),
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"]),
        )
        return own

    conversion.get_model_class = without_words
    runpy.run_path(str(SOURCE / name), run_name="__main__")


def _run(model_file: str, adapter_file: str | None, tokens: list[int], out: str) -> None:
    os.environ |= {"LLAMA_CPP_LIB_PATH": str(LIBRARY.parent), "GGML_NO_BACKTRACE": "1"}
    # The module of the plain functions alone: the package around it imports more than is needed.
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(BINDINGS / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    import llama_cpp.llama_cpp as api

    api.llama_backend_init()
    model = api.llama_model_load_from_file(model_file.encode(), api.llama_model_default_params())
    assert model, "the model is refused"
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(tokens)
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = api.GGML_TYPE_F32
    params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = api.llama_init_from_model(model, params)
    assert context, "the context is refused"
    if adapter_file is not None:
        adapter = api.llama_adapter_lora_init(model, adapter_file.encode())
        assert adapter, "the adapter is refused"
        assert (
            api.llama_set_adapters_lora(
                context, (api.llama_adapter_lora_p_ctypes * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)
            )
            == 0
        ), "the adapter is not set"
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
    assert api.llama_decode(context, batch) == 0, "the tokens are refused"
    words = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    np.save(out, np.ctypeslib.as_array(api.llama_get_logits(context), (len(tokens), words)))


if __name__ == "__main__":
    try:
        build()
        print(f"llama.cpp is built: {LIBRARY}")
    except LlamaError as error:
        print(f"llama.cpp is not built, and its tests are skipped: {error}")
