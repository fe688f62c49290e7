"""A model by its id: refused before its weights are fetched, fetched without waste, resumed where it was cut, and used
from the cache when there is no network. Local sockets only."""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from commands import Run
from local_hub import COMMIT, Hub, serve

from saccade.api.loading.prepare import prepare
from saccade.checkpoint.hub import download, web
from saccade.checkpoint.hub.fetch import READ, fetch_checkpoint, fetch_weights, open_source
from saccade.checkpoint.hub.remote import read_remote
from saccade.checkpoint.open import bundled_path, open_model
from saccade.convert import prepare as convert_prepare
from saccade.convert.changes import Mode
from saccade.errors import CheckpointError, ConfigError, PlanError, RequestError, SaccadeError

BUNDLED = {path.name: path.read_bytes() for path in bundled_path().iterdir() if path.is_file()}
WEIGHTS = {name for name in BUNDLED if name.endswith(".safetensors")}
WASTE = {
    "original/model-00001-of-00001.safetensors": b"x" * 4096, "onnx/model.safetensors": b"y", "pytorch_model.bin": b"z" * 4096,
    "inference/config.json": b"{}", "tf_model.h5": b"h", "consolidated.safetensors": BUNDLED[min(WEIGHTS)], "figure.png": b"p",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the bundled model and much besides, an empty cache, and no waiting."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(BUNDLED | WASTE) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were to be waited; none is."""
    seen: list[float] = []

    def pause(site: web.Site, seconds: float) -> None:
        site.until = 0.0
        if seconds > 0:
            seen.append(seconds)

    monkeypatch.setattr(web.Site, "pause", pause)
    return seen


def cached(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--org--name"


def test_only_what_is_read_is_fetched_and_only_once(hub: Hub, tmp_path: Path) -> None:
    root = fetch_checkpoint("org/name")
    assert root == cached(tmp_path) / "snapshots" / COMMIT
    assert {p.name for p in root.iterdir()} == (set(READ) & set(BUNDLED)) | WEIGHTS
    assert all((root / name).read_bytes() == BUNDLED[name] and (root / name).is_symlink() for name in WEIGHTS)
    whole = {file for file, asked in hub.ranges if asked is None}
    assert whole == {p.name for p in root.iterdir()} and not hub.fetched() & (
        WASTE.keys() - {"consolidated.safetensors"}
    )
    hub.requests.clear()
    assert fetch_checkpoint("org/name", revision="main") == root
    assert len(hub.requests) == 3  # the list; the header of the file that is not kept, behind one redirect


def test_a_file_of_something_else_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    """Only its header is read, to see that no name in it is one of the model."""
    header = json.dumps({"a.lora_A": {"dtype": "U8", "shape": [1 << 20], "data_offsets": [0, 1 << 20]}}).encode()
    hub.files["adapter_model.safetensors"] = len(header).to_bytes(8, "little") + header + bytes(1 << 20)
    prepared = prepare("org/name", device="cpu")
    assert set(prepared.source.missing) == WEIGHTS
    root = prepared.fetch().source.root
    assert {p.name for p in root.iterdir()} == (set(READ) & set(BUNDLED)) | WEIGHTS
    assert sum(asked is not None for file, asked in hub.ranges if file == "adapter_model.safetensors") == 1
    shutil.rmtree(root.parents[2])
    job = convert_prepare.prepare_conversion("org/name", tmp_path / "out", Mode("bf16"))
    assert {p.name for p in Path(job.plan.index.root).iterdir()} == set(BUNDLED)  # the model card too: it is a copy
    del hub.files[min(WEIGHTS)]
    shutil.rmtree(root.parents[2])
    with pytest.raises(PlanError, match=min(WEIGHTS)):
        convert_prepare.prepare_conversion("org/name", tmp_path / "out", Mode("bf16"))
    assert not any(root.parent.rglob("*.safetensors"))


def test_a_copy_keeps_the_small_files_that_nothing_here_reads(hub: Hub) -> None:
    hub.files |= {"LICENSE": b"MIT", "vocab.txt": b"a", "modeling.py": b"", "pytorch_model.bin.index.json": b"{}"}
    root = fetch_checkpoint("org/name", everything=True)
    assert {p.name for p in root.iterdir()} == set(BUNDLED) | {"LICENSE", "vocab.txt", "modeling.py"}


CUTS = {  # how many bytes of an answer come before the connection is closed
    "half of each answer": lambda file, start: len(BUNDLED[file]) // 2 if file in WEIGHTS else None,
    "a little of each": lambda file, start: 1_000_000 if file in WEIGHTS else None,
}


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_download_goes_on_behind_what_has_come(hub: Hub, waits: list[float], kind: str) -> None:
    source = open_source("org/name")
    hub.ranges.clear()
    hub.served.clear()
    hub.cut = CUTS[kind]
    told = []
    root = fetch_weights(source, lambda done, total: told.append((done, total)))
    assert all((root / name).read_bytes() == BUNDLED[name] for name in WEIGHTS)
    assert sum(hub.served) < 1.01 * sum(len(BUNDLED[name]) for name in WEIGHTS)  # and nothing twice
    assert any(asked for _, asked in hub.ranges)
    size = sum(len(BUNDLED[name]) for name in WEIGHTS)
    assert told[-1] == (size, size)


def test_a_later_run_goes_on_where_a_broken_one_stopped(hub: Hub, waits: list[float], tmp_path: Path) -> None:
    source = open_source("org/name")
    hub.cut = lambda file, start: 500_000 if start == 0 else 0
    with pytest.raises(CheckpointError, match=r"of [\d,]+ bytes came|peer closed.*check the network"):
        fetch_checkpoint("org/name")
    assert len(list(cached(tmp_path).glob("blobs/*.incomplete"))) >= 1
    hub.cut = lambda file, start: None
    hub.ranges.clear()
    root = fetch_checkpoint("org/name")
    assert ("bytes=500000-") in {asked for _, asked in hub.ranges}
    assert all((root / name).read_bytes() == BUNDLED[name] for name in WEIGHTS)
    assert not list(cached(tmp_path).glob("blobs/*.incomplete")) and source.missing


def test_a_server_that_cannot_resume_sends_all_again(hub: Hub, waits: list[float]) -> None:
    for name in WEIGHTS:
        hub.sha256[name] = hashlib.sha256(BUNDLED[name]).hexdigest()
    source = open_source("org/name")
    first: set[str] = set()
    hub.cut = lambda file, start: None if file in first else first.add(file) or 500_000  # type: ignore[func-returns-value]
    hub.ignores_ranges = True
    root = fetch_weights(source)
    assert all((root / name).read_bytes() == BUNDLED[name] for name in WEIGHTS)


def test_what_is_not_what_the_hub_lists_is_not_kept(hub: Hub, waits: list[float], tmp_path: Path) -> None:
    name = min(WEIGHTS)
    hub.sha256[name] = "0" * 64
    with pytest.raises(CheckpointError, match=f"{name}.*SHA-256 differs"):
        fetch_checkpoint("org/name")
    assert not (cached(tmp_path) / "snapshots" / COMMIT / name).exists()


EARLY = {  # refused by config, headers and side files: what is asked, what it says
    "another architecture": ({"config.json": b'{"model_type": "llama"}'}, {}, "llama"),
    "a tensor missing": ({min(WEIGHTS): None}, {}, "is listed by model.safetensors.index.json"),
    "no such device": ({}, {"device": "cuda:99"}, "cuda:99"),
    "no such setting": ({}, {"index_cache": "int3"}, "index_cache"),
    "too large a cache": ({}, {"cache_tokens": 2**39}, "device memory"),
    "drafts without a layer": ({}, {"mtp": False, "speculate": 2}, "MTP"),
}  # fmt: skip


@pytest.mark.parametrize("kind", EARLY)
def test_what_can_be_known_is_refused_before_weights_are_fetched(hub: Hub, kind: str) -> None:
    files, options, words = EARLY[kind]
    hub.files = {k: v for k, v in (hub.files | files).items() if v is not None}
    with pytest.raises(SaccadeError, match=words):
        prepare("org/name", **options)  # type: ignore[arg-type]
    assert not {file for file, asked in hub.ranges if asked is None} & WEIGHTS


def test_weights_that_memory_does_not_hold_are_not_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saccade.api.loading.prepare.find_free_bytes", lambda _: 1 << 20)
    with pytest.raises(ConfigError, match="1,048,576 bytes are free on cpu"):
        prepare("org/name", "cpu")
    assert not {file for file, asked in hub.ranges if asked is None} & WEIGHTS


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["generate", "--prompt", "Tom has 3 pens. " * 2000], "tokens"),
        (["generate", "--prompt", "\udcff"], "cannot be encoded"),
        (["score", "--tokens", "1,999999"], "not in the vocabulary"),
        (["score", "--tokens", ",".join(["5"] * 9000)], "9000 tokens to score"),
        (["eval", "--tokens", "9999"], "tokens: expected at most"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_before_weights_are_fetched(
    run: Run, hub: Hub, line: list[str], words: str
) -> None:
    ran = run(line[0], "org/name", *line[1:], "--device", "cpu")
    assert (ran.code, ran.out) == (2, "") and words in ran.err
    assert not {file for file, asked in hub.ranges if asked is None} & WEIGHTS


def test_text_without_a_tokenizer_is_refused_before_weights_are_fetched(run: Run, hub: Hub) -> None:
    del hub.files["tokenizer.json"]
    for line in (["generate", "org/name", "--prompt", "a"], ["eval", "org/name"]):
        ran = run(*line, "--device", "cpu")
        assert ran.code == 2 and "needs a tokenizer" in ran.err
    assert not {file for file, asked in hub.ranges if asked is None} & WEIGHTS


def test_generate_runs_a_model_by_its_id_and_revision(run: Run, hub: Hub) -> None:
    ran = run("generate", "org/name", "--revision", "v1", "--prompt", "Tom", "--max-tokens", "2", "--device", "cpu")
    assert ran.code == 0 and "fetched org/name in" in ran.err
    assert any("/revision/v1" in path for path in hub.requests)
    ran = run("score", "org/name", "--revision", "v2", "--tokens", "1,2")
    assert ran.code == 2 and "no such revision" in ran.err
    for name in ("../x", "a..b", "a b", "-x", ""):
        assert "as revision" in run("check", "org/name", f"--revision={name}").err
    assert "only a Hugging Face id has revisions" in run("check", bundled_path(), "--revision", "main").err


def test_a_cached_model_is_used_offline_and_while_the_hub_is_down(
    run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    fetch_checkpoint("org/name", "v1")
    lines = (["check"], ["plan"], ["explain", "lm_head.weight"], ["score", "--tokens", "1,2", "--device", "cpu"])
    for way in ("down", "busy", "offline"):
        if way == "offline":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        status = {"down": (502, {}), "busy": (429, {"Retry-After": "9999"}), "offline": (500, {})}[way]
        hub.refuse = lambda path, status=status: status  # type: ignore[misc]
        hub.requests.clear()
        for command, *rest in lines:
            ran = run(command, "org/name", *rest, "--revision", "v1")
            assert ran.code == 0, ran.err
            assert f"note: org/name is read in the download cache, at commit {COMMIT}" in ran.err
            assert ("is busy (HTTP 429" in ran.err) == (way == "busy") and ("HTTP 502" in ran.err) == (way == "down")
        assert (way == "offline") == (hub.requests == [])
    ran = run("check", "org/name")
    assert ran.code == 2 and "not in the download cache, and HF_HUB_OFFLINE is set" in ran.err  # "main" never was


def test_half_a_model_in_the_cache_is_told_as_such(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = fetch_checkpoint("org/name")
    for path in root.glob("*.safetensors*"):
        path.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"only a part of it is in the download cache .*, and HF_HUB_OFFLINE"):
        open_model("org/name")


DISK = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "is full",
    errno.EROFS: "cannot be written",
    errno.EIO: "cannot be written",
}


@pytest.mark.parametrize("number", DISK)
def test_a_disk_that_refuses_is_named_and_what_came_is_kept(
    hub: Hub, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, left = open_source("org/name"), [1_000_000]

    class Full(io.BufferedRandom):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(number, os.strerror(number))
            return super().write(data)

    def open_full(path: Path, mode: str) -> io.BufferedRandom:
        return Full(io.FileIO(path, mode.replace("b", "")))

    monkeypatch.setattr(download, "open", open_full, raising=False)
    with pytest.raises(CheckpointError, match=f"^org/name: .*{cached(tmp_path)} {DISK[number]}.*HF_HOME"):
        fetch_weights(source)
    kept = sum(p.stat().st_size for p in cached(tmp_path).glob("blobs/*.incomplete"))
    assert kept > 0


def test_no_room_is_told_before_the_first_byte(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("org/name")
    hub.ranges.clear()
    usage = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    size = sum(len(BUNDLED[name]) for name in WEIGHTS)
    with pytest.raises(
        CheckpointError, match=f"{size:,} bytes are to be fetched into .*, where 5,000,000 are free.*HF_HOME"
    ):
        fetch_weights(source)
    assert hub.ranges == []


def test_a_cache_that_cannot_be_made_is_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(
        CheckpointError, match="org/name: the download cache .* cannot be written: Not a directory.*HF_HOME"
    ):
        fetch_checkpoint("org/name")
    assert open_model("org/name")[1].problems == ()  # which needs none


def test_a_cache_without_locks_is_filled_all_the_same(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(download.fcntl, "flock", refuse)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    root = fetch_checkpoint("org/name")
    assert all((root / name).read_bytes() == BUNDLED[name] for name in WEIGHTS)
    assert not list(cached(tmp_path).glob("blobs/*"))


BROKEN = {  # the answer to everything -> what the one line says
    "no access": ((401, {"X-Error-Code": "GatedRepo"}), "accept the model's terms at"),
    "forbidden": ((403, {"X-Error-Message": "token of another org"}), "refuses access (HTTP 403: token of another org)"),
    "not found": ((404, {}), "no such model"),
    "no revision": ((404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}), "not this revision: Invalid rev id"),
    "proxy": ((407, {}), "the proxy wants a password"),
    "a circle": ((302, {"Location": "/org/name"}), "redirects in a circle"),
    "to nowhere": ((302, {}), "redirects the list of files to nowhere"),
    "to another protocol": ((302, {"Location": "ftp://127.0.0.1/"}), "UnsupportedProtocol"),
    "a login page": ((200, {"Content-Type": "text/html; charset=utf-8"}), "a web page in place of"),
    "no JSON": ((200, {}), "is it a Hugging Face server"),
    "compressed": ((200, {"Content-Encoding": "gzip"}), "compresses"),
    "too long": ((200, {"Content-Length": "4"}), "is it a Hugging Face server"),
    "too short": ((200, {"Content-Length": "400"}), "4 attempts"),
    "no length": ((200, {"Content-Length": "-1"}), "org/name"),
    "broken": ((500, {}), "HTTP 500, 4 attempts"),
    "teapot": ((418, {}), "answers HTTP 418"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_a_server_answers_is_one_line(
    run: Run, hub: Hub, waits: list[float], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, words = BROKEN[kind]
    hub.refuse = lambda path: answer
    monkeypatch.setattr(web, "TIMEOUT", 0.3)
    ran = run("check", "org/name")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
    assert ran.err.startswith("saccade: org/name: ") and words in ran.err


PLACES = {  # environment -> what the one line says
    "no scheme": ("hub.invalid", {}, "HF_ENDPOINT"),
    "another scheme": ("ftp://hub.invalid", {}, "HF_ENDPOINT"),
    "a bad port": ("http://hub.invalid:x1", {}, "HF_ENDPOINT"),
    "a port too large": ("http://hub.invalid:99999", {}, "HF_ENDPOINT"),
    "no host": ("https://", {}, "HF_ENDPOINT"),
    "a space": ("http://hub .invalid", {}, "HF_ENDPOINT"),
    "plain http by https": ("https://127.0.0.1:{port}", {}, "http:// and not https://"),
    "a proxy by socks": ("http://hub.invalid", {"ALL_PROXY": "socks5://me:secret@127.0.0.1:9"}, "proxy socks5://...@127.0.0.1:9"),
    "a proxy that is none": ("http://hub.invalid", {"ALL_PROXY": "127.0.0.1 9"}, "proxy"),
    "a proxy that is down": ("http://hub.invalid", {"HTTP_PROXY": "http://me:secret@127.0.0.1:9"}, "through the proxy http://...@127.0.0.1:9"),
    "certificates lost": ("https://hub.invalid", {"SSL_CERT_FILE": "/nowhere.pem"}, "SSL_CERT_FILE"),
    "a token in Chinese": ("http://hub.invalid", {"HF_TOKEN": "模型"}, "HF_TOKEN"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_whatever_the_environment_says_is_one_line(
    run: Run, hub: Hub, waits: list[float], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, environment, words = PLACES[kind]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint.format(port=hub.server_port))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for line in (["check", "org/name"], ["generate", "org/name", "--prompt", "x"]):
        ran = run(*line)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
        assert ran.err.startswith("saccade: org/name: ") and words in ran.err and "secret" not in ran.err


def test_a_busy_server_is_waited_for_as_it_says(hub: Hub, waits: list[float]) -> None:
    now = datetime.now(UTC)
    said = [
        (429, {"Retry-After": "40"}), (503, {"Retry-After": format_datetime(now + timedelta(seconds=30)), "Date": format_datetime(now)}),
        (429, {"RateLimit": '"api";r=0;t=20'}), (503, {"Retry-After": "soon"}),
    ]  # fmt: skip
    left = list(said)
    hub.refuse = lambda path: left.pop(0) if left else None
    told: list[str] = []
    assert read_remote("org/name", tell=told.append)[1].problems == ()
    long = [round(seconds) for seconds in waits if seconds > 2]
    assert [t for t in (40, 30, 20) if not any(abs(t - seconds) <= 2 for seconds in long)] == []
    assert "HTTP 429: too many requests); waiting 40 s" in told[0]


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (429, {"Retry-After": "7200"}, "is busy (HTTP 429: too many requests) and says to come back in 7,200 s, at"),
        (503, {"Retry-After": "50"}, "is busy (HTTP 503) and says to come back in 50 s"),  # the third time
        (429, {}, "HTTP 429: too many requests, 8 attempts); try again later"),
    ],
)
def test_a_server_that_is_busy_for_long_is_told_as_such(
    hub: Hub, waits: list[float], status: int, headers: dict[str, str], words: str
) -> None:
    hub.refuse = lambda path: (status, headers)
    with pytest.raises(CheckpointError) as refused:
        read_remote("org/name")
    assert words in str(refused.value) and "network" not in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
def test_half_of_a_surrogate_pair_in_a_file_is_no_traceback(run: Run, tmp_path: Path, name: str) -> None:
    root = shutil.copytree(bundled_path(), tmp_path / "m")
    values = json.loads((root / name).read_text()) if (root / name).exists() else {}
    values |= {
        "_name_or_path": "\udce9",
        "bos_token": "\udce9",
        "add_bos_token": True,
        "transformers_version": "\udce9",
    }
    (root / name).write_text(json.dumps(values))
    ran = run("generate", root, "--prompt", "Tom", "--max-tokens", "1", "--device", "cpu")
    assert ran.code in (0, 2) and (ran.code == 0 or name in ran.err)


def test_convert_fetches_all_that_a_copy_keeps_after_headers_have_passed(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.files |= {"LICENSE": b"MIT"}
    lost = hub.files.pop(min(WEIGHTS))
    ran = run("convert", "org/name", tmp_path / "out", "--bf16")
    assert ran.code == 2 and min(WEIGHTS) in ran.err
    assert not {file for file, asked in hub.ranges if asked is None} & WEIGHTS
    hub.files[min(WEIGHTS)] = lost
    ran = run("convert", "org/name", tmp_path / "out", "--bf16", "--revision", "v1")
    assert ran.code == 0 and f"fetching {len(WEIGHTS)} files of org/name into" in ran.err, ran.err
    assert (tmp_path / "out" / "LICENSE").read_bytes() == b"MIT" and not hub.fetched() & {"onnx/model.safetensors"}
    assert "saccade check" not in ran.err and run("check", tmp_path / "out").code == 0


def test_two_at_once_fetch_each_byte_once(hub: Hub) -> None:
    told: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        roots = set(pool.map(lambda _: fetch_checkpoint("org/name", tell=told.append), range(2)))
    assert len(roots) == 1 and all((next(iter(roots)) / name).read_bytes() == BUNDLED[name] for name in WEIGHTS)
    assert sum(asked is None and file in WEIGHTS for file, asked in hub.ranges) == len(WEIGHTS)


STOPPED = """
import os, signal, sys, threading, time
import typer
from saccade.checkpoint.hub import download
from saccade.checkpoint.hub.fetch import fetch_checkpoint
from saccade.cli.terminal import reports
fetch = download.fill_file
def fill(*args):
    if args[1].endswith(".safetensors"):
        if "00001" in args[1]:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        args[0].site.pause(30)
    return fetch(*args)
download.fill_file = fill
app = typer.Typer()
app.command()(reports(2)(lambda: print(fetch_checkpoint("org/name"))))
app()
"""


def test_ctrl_c_while_weights_are_fetched_ends_at_once_in_one_line(hub: Hub, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "c"), "NO_PROXY": "127.0.0.1"}
    line = [sys.executable, "-c", STOPPED]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=25, env=environment)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "saccade: interrupted\n")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "10s", "HF_..."),
        ("HF_TOKEN_PATH", "{folder}", "token"),
    ],
)
def test_what_the_library_does_not_survive_is_one_line(
    hub: Hub, tmp_path: Path, name: str, value: str, words: str
) -> None:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", name: value.format(folder=tmp_path)}
    line = [sys.executable, "-m", "saccade", "check", "org/name"]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=30, env=environment)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1) and words in ran.stderr, ran.stderr


def test_benchmarks_take_ids_too(run: Run, hub: Hub) -> None:
    ran = run("bench", "load", "org/name", "--pairs", "0")
    assert ran.code == 2 and "pairs" in ran.err
    assert {file for file, asked in hub.ranges if asked is None} > WEIGHTS


def test_prepared_requests_are_judged_as_the_engine_does() -> None:
    prepared = prepare(device="cpu")
    prepared.check([1, 2])
    prepared.check_scoring([1])
    for tokens in ([10**6], [1] * 10**5):
        with pytest.raises(RequestError):
            prepared.check(tokens)
        with pytest.raises(RequestError):
            prepared.check_scoring(tokens)
