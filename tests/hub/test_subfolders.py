"""Adapters that lie in a folder of a repository, or of another folder."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import AdapterBank, adapter_state_dict, export_adapter, load_adapter, pull_adapter
from lightning_lora.errors import AdapterFormatError, ConfigError, HubUnavailableError
from tests.hub.models import Linears, assert_same, state, trained

pytestmark = pytest.mark.usefixtures("short_waits")
PLACES = ["v2", "runs/best step", "a/b/c"]


@pytest.fixture(params=PLACES)
def place(request, hub, files):
    more = {f"{request.param}/{name}": content for name, content in files.items()}
    hub.create_repo("user/many", private=True, files={**more, "README.md": b"# Many", "other/notes.txt": b""})
    return request.param


def test_an_adapter_in_a_folder_of_a_repository_is_pulled_and_loaded(place, source, files, tmp_path):
    folder = pull_adapter("user/many", subfolder=place)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    copied = pull_adapter("user/many", subfolder=place, local_dir=tmp_path / "copied")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == files
    model = Linears()
    load_adapter(model, "user/many", subfolder=place, check_base=False)
    assert all(torch.equal(t, trained(source)[name]) for name, t in adapter_state_dict(model).items())
    bank = AdapterBank(Linears())
    bank.add("it", "user/many@main", subfolder=place, check_base=False)
    with pytest.raises(ConfigError, match="leave out one"):
        bank.add("other", "user/many@main", revision="v2", subfolder=place)
    export_adapter("user/many", tmp_path / "exported", consumer="vllm", subfolder=place)


def test_it_is_found_in_the_cache_again(place, hub):
    folder = pull_adapter("user/many", subfolder=place)
    assert pull_adapter("user/many", subfolder=place, local_files_only=True) == folder
    with pytest.raises(HubUnavailableError, match="not in the cache"):
        pull_adapter("user/many", subfolder="other", local_files_only=True)
    with pytest.raises(HubUnavailableError, match="not in the cache"):
        pull_adapter("user/many", local_files_only=True)


def test_two_folders_of_one_commit_do_not_mix(hub, files, source):
    first = {f"one/{name}": content for name, content in files.items()}
    hub.create_repo("user/two", files={**first, **files, "README.md": b"# Top"})
    top, one = pull_adapter("user/two"), pull_adapter("user/two", subfolder="one")
    assert (top / "README.md").read_bytes() == b"# Top"
    assert (one / "README.md").read_bytes() == files["README.md"]
    assert top != one


def test_a_repository_without_an_adapter_at_its_top_says_where_to_look(place):
    with pytest.raises(AdapterFormatError, match=r"user/many at .* lacks adapter_config.*say subfolder='"):
        pull_adapter("user/many")
    with pytest.raises(AdapterFormatError, match=r"nowhere of user/many at .* lacks.*holds: nothing"):
        pull_adapter("user/many", subfolder="nowhere")
    with pytest.raises(AdapterFormatError, match=r"other of user/many at .* lacks.*notes\.txt"):
        pull_adapter("user/many", subfolder="other")


def test_what_is_wrong_in_it_is_named_by_its_place(hub, files):
    hub.create_repo("user/bad", files={f"v2/{n}": c for n, c in {**files, "adapter_config.json": b"{}"}.items()})
    with pytest.raises(AdapterFormatError, match=r"user/bad@\w{12}/v2/adapter_config\.json"):
        pull_adapter("user/bad", subfolder="v2")


@pytest.mark.parametrize("subfolder", ["..", "../other", "/etc", "a//b", "a\\b", "a/../b", 3])
def test_a_folder_that_leads_elsewhere_is_refused(subfolder, hub, files, tmp_path):
    hub.create_repo("user/many", files=files)
    for read in (pull_adapter, lambda *a, **o: load_adapter(Linears(), *a, **o)):
        with pytest.raises(ConfigError, match="subfolder is a folder"):
            read("user/many", subfolder=subfolder)
    with pytest.raises(ConfigError, match="subfolder is a folder"):
        load_adapter(Linears(), tmp_path, subfolder=subfolder)
    assert not hub.requested("/resolve/")


def test_a_folder_here_has_subfolders_too(files, source, tmp_path):
    (tmp_path / "all" / "v2").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "all" / "v2" / name).write_bytes(content)
    model = Linears()
    before = state(model)
    with pytest.raises(AdapterFormatError, match="lacks adapter_config"):
        load_adapter(model, tmp_path / "all", check_base=False)
    with pytest.raises(AdapterFormatError, match="no folder"):
        load_adapter(model, tmp_path / "all", subfolder="v3", check_base=False)
    assert_same(before, state(model))
    load_adapter(model, tmp_path / "all", subfolder="v2", check_base=False)
    assert all(torch.equal(t, trained(source)[name]) for name, t in adapter_state_dict(model).items())


def test_a_mirror_that_only_knows_trees_serves_folders_too(place, hub):
    hub.fail(404, path="/paths-info/", times=100)
    assert (pull_adapter("user/many", subfolder=place) / "adapter_config.json").is_file()
