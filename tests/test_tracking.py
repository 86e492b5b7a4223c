import os

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lqf_lightning.tracking import has_credentials, wandb_logger

OWN_SERVER = "http://wandb.example.org:8080"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home folder of somebody who has never heard of W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "restored afterwards")
    monkeypatch.setenv("WANDB_QUIET", "restored afterwards")
    del os.environ["WANDB_MODE"], os.environ["WANDB_QUIET"]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def write_netrc(path, machine="api.wandb.ai", password="0" * 40):
    path.write_text(f"machine {machine}\n  login user\n  password {password}\n")
    path.chmod(0o600)


def log_in_to_own_server(home):
    settings = home / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(f"[default]\nbase_url = {OWN_SERVER}\n")


def test_without_an_account_runs_stay_offline(tmp_path):
    logger = wandb_logger(str(tmp_path / "run"))
    assert os.environ["WANDB_MODE"] == "offline"
    assert logger._wandb_init["project"] == "lqf-lightning"


@pytest.mark.parametrize("mode", ["online", "disabled", "offline", ""])
def test_a_mode_that_was_chosen_stays(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    wandb_logger(str(tmp_path / "run"))
    assert os.environ["WANDB_MODE"] == mode
    assert "WANDB_QUIET" not in os.environ


def test_with_an_account_the_mode_is_left_to_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb_logger(str(tmp_path / "run"))
    assert "WANDB_MODE" not in os.environ


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_the_environment_may_hold_the_account(variable, monkeypatch):
    assert not has_credentials()
    monkeypatch.setenv(variable, "")
    assert not has_credentials()
    monkeypatch.setenv(variable, "something")
    assert has_credentials()


def test_the_netrc_file_may_hold_the_account(home):
    write_netrc(home / ".netrc")
    assert has_credentials()


def test_the_netrc_file_may_lie_elsewhere(home, tmp_path, monkeypatch):
    write_netrc(home / "other")
    assert not has_credentials()
    monkeypatch.setenv("NETRC", "~/other")
    assert has_credentials()


def test_an_entry_of_another_machine_or_without_a_key_is_no_account(home):
    write_netrc(home / ".netrc", machine="github.com")
    assert not has_credentials()
    write_netrc(home / ".netrc", password='""')
    assert not has_credentials()


@pytest.mark.parametrize("content", [b"machine", b"this is no netrc file {", b"\xff\xfe\x00"])
def test_a_broken_netrc_file_is_no_account(content, home):
    (home / ".netrc").write_bytes(content)
    (home / ".netrc").chmod(0o600)
    assert not has_credentials()


@pytest.mark.parametrize("machine", ["wandb.example.org:8080", "api.wandb.ai"])
def test_a_server_of_ones_own_has_its_own_account(machine, home, monkeypatch):
    write_netrc(home / ".netrc", machine=machine)
    own = machine != "api.wandb.ai"
    assert has_credentials() != own
    monkeypatch.setenv("WANDB_BASE_URL", OWN_SERVER)
    assert has_credentials() == own


def test_the_address_of_the_server_may_be_the_one_of_the_last_login(home, monkeypatch):
    write_netrc(home / ".netrc", machine="wandb.example.org:8080")
    log_in_to_own_server(home)
    assert has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    assert not has_credentials()


def test_our_view_of_the_account_is_that_of_wandb(home, monkeypatch):
    from wandb.sdk.lib.wbauth import read_netrc_auth

    write_netrc(home / ".netrc", machine="wandb.example.org:8080")
    for address in (OWN_SERVER, "http://wandb.example.org", "https://api.wandb.ai"):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        assert has_credentials() == (read_netrc_auth(host=address) is not None)


def test_the_id_of_a_run_is_kept_in_its_folder(tmp_path):
    first, second = (wandb_logger(str(tmp_path / "run"))._wandb_init["id"] for _ in range(2))
    other = wandb_logger(str(tmp_path / "other"))._wandb_init["id"]
    assert first == second == (tmp_path / "run" / "wandb_run_id").read_text()
    assert len({first, other}) == 2


def test_other_ranks_have_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    wandb_logger(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_job_of_a_sweep_is_grouped_under_its_folder(tmp_path):
    sweep = tmp_path / "2026-01-01"
    sweep.mkdir()
    (sweep / "multirun.yaml").touch()
    assert wandb_logger(str(sweep / "0"))._wandb_init["group"] == "2026-01-01"
    assert wandb_logger(str(sweep / "0"), group="mine")._wandb_init["group"] == "mine"
    assert wandb_logger(str(tmp_path / "run"))._wandb_init["group"] is None


def test_settings_reach_wandb(tmp_path):
    logger = wandb_logger(str(tmp_path / "run"), project="p", tags=("a", "b"), notes="why", log_model=True)
    told = logger._wandb_init
    assert (told["project"], told["name"], told["tags"], told["notes"]) == ("p", "run", ["a", "b"], "why")
    assert told["resume"] == "allow"
    assert logger._log_model is True
    assert wandb_logger(str(tmp_path / "run"), name="given")._wandb_init["name"] == "given"
