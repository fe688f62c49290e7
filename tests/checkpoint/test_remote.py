"""Models on a server: only config, index and headers are fetched; every failure is one clear error. Local sockets only."""

import json
import socket
import struct

import pytest
from local_hub import Answers, serve
from published_configs import glm5_config

from saccade.checkpoint.hub.remote import read_remote
from saccade.checkpoint.index import INDEX_FILE, read_index
from saccade.checkpoint.open import looks_remote, open_model
from saccade.errors import CheckpointError, ConfigError

DATA = 3 << 20  # bytes of tensors per shard: far more than any header


def shard(*names, padding=0) -> bytes:
    size = DATA // len(names)
    table = {
        n: {"dtype": "U8", "shape": [size], "data_offsets": [i * size, i * size + size]} for i, n in enumerate(names)
    }
    raw = json.dumps(table).encode() + b" " * padding
    return struct.pack("<Q", len(raw)) + raw + bytes(size * len(names))


FILES = {
    "config.json": json.dumps(glm5_config()).encode(),
    INDEX_FILE: json.dumps(
        {"weight_map": {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}
    ).encode(),
    "m-1.safetensors": shard("a", "b"),
    "m-2.safetensors": shard("c"),
    "sub/copy.safetensors": b"not ours",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(FILES) as server:
        yield server


def test_remote_and_local_give_the_same_index(hub, tmp_path):
    for name, raw in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    config, remote = open_model("org/name", endpoint=hub.url)
    here, local = open_model(tmp_path)
    assert config == here
    assert (remote.entries, remote.files, remote.problems, remote.notes) == (local.entries, local.files, (), ())
    assert remote.root == "org/name"


def test_only_headers_cross_the_network(hub):
    _, index = read_remote("org/name", endpoint=hub.url)
    known = len(FILES["config.json"]) + len(FILES[INDEX_FILE])
    assert sum(hub.served) == index.bytes_read
    assert known < index.bytes_read < known + 3000 < DATA
    assert len(hub.requests) == 1 + 2 * 4  # each file is asked for once, behind one redirect
    assert not any("copy" in r for r in hub.requests)


def test_a_header_longer_than_guessed_costs_one_more_request(hub):
    hub.files["m-1.safetensors"] = shard("a", "b", padding=40_000)
    _, index = read_remote("org/name", endpoint=hub.url)
    assert index.problems == () and set(index.entries) == {"a", "b", "c"}
    assert index.files[0].header_bytes > 40_000
    assert len(hub.requests) == 1 + 2 * 4 + 1  # and not a second redirect
    assert sum(hub.served) < 50_000


def test_files_that_no_index_lists_are_read_too(hub):
    del hub.files[INDEX_FILE]
    _, index = read_remote("org/name", endpoint=hub.url)
    assert set(index.entries) == {"a", "b", "c"} and index.problems == ()
    assert sum(hub.served) < 2 * (64 << 10) + 10_000


def test_faults_of_remote_files_are_problems_as_they_are_for_local_ones(hub):
    hub.files["m-1.safetensors"] = shard("a", "b")[:-10]
    hub.files["m-2.safetensors"] = struct.pack("<Q", 1 << 60) + bytes(1 << 20)
    hub.files["n.safetensors"] = b""
    _, index = read_remote("org/name", endpoint=hub.url)
    found = {(p.kind, p.name) for p in index.problems}
    assert found == {("truncated", "m-1.safetensors"), ("header", "m-2.safetensors"), ("truncated", "n.safetensors")}
    assert sum(hub.served) < 10_000


def test_a_server_that_ignores_ranges_is_refused_before_it_sends_everything(hub):
    hub.ignores_ranges = True
    hub.files["m-1.safetensors"] += bytes(64 << 20)
    with pytest.raises(CheckpointError, match="ignored the byte range asked of m-"):
        read_remote("org/name", endpoint=hub.url)
    assert sum(hub.served) < 24 << 20  # what fits into socket buffers


def test_temporary_failures_are_asked_again_and_only_a_few_times(hub):
    hub.failures = [503, 429]
    assert read_remote("org/name", endpoint=hub.url, wait=0.001)[1].problems == ()
    hub.failures, hub.requests[:] = [500] * 100, []
    with pytest.raises(CheckpointError, match=r"HTTP 500, 4 attempts"):
        read_remote("org/name", endpoint=hub.url, wait=0.001)
    assert len(hub.requests) == 4


def test_no_such_repository_is_named(hub):
    with pytest.raises(CheckpointError, match="org/other: no such path, and no such model"):
        read_remote("org/other", endpoint=hub.url)
    assert len(hub.requests) == 1


@pytest.mark.parametrize(("status", "words"), [(403, "refuses access"), (418, "HTTP 418")])
def test_other_refusals_are_told_by_status(hub, status, words):
    hub.failures = [0, status]
    with pytest.raises(CheckpointError, match=words):
        read_remote("org/name", endpoint=hub.url)


def test_no_network_is_one_clear_error():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, but nobody listens
        with pytest.raises(CheckpointError, match="cannot be fetched from http://127.0.0.1.*check the network"):
            read_remote("org/name", endpoint=f"http://127.0.0.1:{s.getsockname()[1]}", wait=0.001)


@pytest.mark.parametrize(("lost", "words"), [("config.json", "no config.json"), (".safetensors", "no .safetensors")])
def test_a_repository_that_is_no_model_is_refused(hub, lost, words):
    hub.files = {f: raw for f, raw in hub.files.items() if not f.endswith(lost)}
    with pytest.raises(CheckpointError, match=words):
        read_remote("org/name", endpoint=hub.url)


def test_a_repository_of_another_format_is_named_so(hub):
    for files, words in {
        ("README.md", "m.gguf"): "holds m.gguf, which is GGUF",
        ("config.json", "pytorch_model.bin"): "pickle",
        ("adapter_config.json", "adapter_model.safetensors"): "a LoRA adapter",
    }.items():
        hub.files = {name: b"{}" for name in files}
        with pytest.raises(CheckpointError, match=f"^org/name: .*{words}"):
            read_remote("org/name", endpoint=hub.url)


def test_an_answer_that_is_not_the_hubs_is_one_clear_error(hub):
    hub.failures = [200]  # "busy" in place of a list of files
    with pytest.raises(CheckpointError, match="is it a Hugging Face server"):
        read_remote("org/name", endpoint=hub.url)


def test_a_broken_remote_config_is_a_config_error(hub):
    hub.files["config.json"] = b"{"
    with pytest.raises(ConfigError, match="org/name/config.json: not JSON"):
        open_model("org/name", endpoint=hub.url)


@pytest.mark.parametrize(
    "model",
    [
        "/a/b",
        "./a",
        "../a",
        "~/a",
        "a/b/c",
        "a",
        "a/b.safetensors",
        "a//b",
        "",
        ".",
        "-a/b",
        "a b/c",
        "a/b--c",
        "a--b/c",
        "a/b..c",
        "a/..",
        "a/b.git",
        "a/b-",
        "a/b.",
        "a/.b",
        "a/" + 95 * "b",
        "a/模型",
        "a/b\n",
        "a/b?c",
        "a/b#c",
        "a/b.gguf",
    ],
)
def test_what_looks_like_a_path_never_goes_to_the_network(model, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not looks_remote(model)
    with pytest.raises((CheckpointError, ConfigError)):
        open_model(model, endpoint=hub.url)
    assert hub.requests == []


@pytest.mark.parametrize("model", ["a" * 5000, "~no-such-user-at-all/x", "nul\0byte"])
def test_a_path_that_the_system_refuses_is_a_checkpoint_error(model):
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_model(model)


def test_a_path_that_cannot_be_searched_is_an_error_and_not_an_id(monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("saccade.checkpoint.open.os.stat", refuse)  # permissions do not bind every user
    for ask in (looks_remote, open_model):
        with pytest.raises(CheckpointError, match="org/name: cannot be opened: Permission denied"):
            ask("org/name")


def test_an_existing_path_wins_over_an_id(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    assert looks_remote("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not looks_remote("org/name")
    with pytest.raises(CheckpointError, match=r"org/name: is empty; expected"):
        open_model("org/name", endpoint=hub.url)


def test_a_single_file_takes_the_config_beside_it(tmp_path):
    (tmp_path / "config.json").write_bytes(FILES["config.json"])
    (tmp_path / "m.safetensors").write_bytes(FILES["m-2.safetensors"])
    config, index = open_model(str(tmp_path / "m.safetensors"))
    assert config.hidden_size == 6144 and index == read_index(tmp_path)


def test_a_token_is_not_carried_to_another_host(hub, monkeypatch):
    """The Hub redirects to storage that is not its own; only the Hub may see who asks."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    other = hub.url.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    plain = Answers.answer

    def elsewhere(self, status, body, headers=None, cut=None):
        if headers and "Location" in headers:
            headers = {"Location": other + headers["Location"]}
        return plain(self, status, body, headers, cut)

    monkeypatch.setattr(Answers, "answer", elsewhere)
    read_remote("org/name", endpoint=hub.url)
    seen = {bool(token) for path, token in hub.authorized if path.startswith("/storage/")}
    assert seen == {False}
    assert any(token for path, token in hub.authorized if path.startswith("/api/"))
