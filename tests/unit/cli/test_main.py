import argparse
import io
import json
from pathlib import Path

import pytest

from guest_program import Ending, say
from kata_hybrid import __version__
from kata_hybrid.cli.main import main, make_parser, run
from kata_hybrid.cli.output import Output
from kata_hybrid.errors import FailedPreconditionError, InvalidArgumentError
from kata_hybrid.guest.manifest import read_manifest

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty configuration, whatever this machine has."""
    path = tmp_path / "configuration.toml"
    path.write_text("")
    monkeypatch.setenv("KATA_CONF_FILE", str(path))
    return path


def test_version(capsys: Captured) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"kata-hybrid {__version__}\n"


@pytest.mark.parametrize("command", ["version", "env"])
def test_json_is_one_document_and_nothing_else(capsys: Captured, command: str) -> None:
    assert main([command, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["version"] == __version__
    assert captured.err == ""


def test_env_shows_the_configuration_in_force(capsys: Captured, no_configuration: Path) -> None:
    no_configuration.write_text("[hypervisor.qemu]\ndefault_memory = 333\n")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"configuration = {no_configuration}" in out
    assert "hypervisor.qemu.memory_mib = 333" in out


def test_a_configuration_is_checked_before_it_is_used(
    capsys: Captured, no_configuration: Path
) -> None:
    assert main(["config", "check"]) == 0
    assert str(no_configuration) in capsys.readouterr().out
    other = no_configuration.with_name("other.toml")
    other.write_text("[runtime]\nenable_pprof = true\n")
    assert main(["config", "check", str(other)]) == 0
    assert "ignored: " in capsys.readouterr().out
    other.write_text("[runtime]\nlog_level = 'loud'\n")
    assert main(["config", "check", str(other)]) == 1
    assert "log_level" in capsys.readouterr().err


def test_the_schema_is_printed(capsys: Captured) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$schema"].endswith("2020-12/schema")


def test_env_shows_the_run_directory(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_HYBRID_RUN_DIR", "/elsewhere")
    main(["env", "--json"])
    assert json.loads(capsys.readouterr().out)["run_dir"] == "/elsewhere"


def test_a_wrong_configuration_is_one_line_and_status_1(
    capsys: Captured, no_configuration: Path
) -> None:
    no_configuration.write_text("[runtime]\nnam = 'x'\n")
    assert main(["env"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "runtime.nam" in captured.err


def test_a_failure_with_json_is_a_document_too(capsys: Captured, no_configuration: Path) -> None:
    no_configuration.write_text("[runtime]\nnam = 'x'\n")
    assert main(["env", "--json"]) == 1
    assert "runtime.nam" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["guest"], ["version", "--xml"]])
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_guest_build_writes_a_guest_and_prints_it(capsys: Captured, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(say(b"x", ending=Ending.PAUSE))
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"\x7fELF" + b"Linux version 9.9-none (x)")
    paths = ("--kernel", str(kernel), "--agent", str(program), "--init", str(program))
    folders = ("--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"))
    status = main(["guest", "build", "--json", *paths, *folders])
    assert status == 0
    document = json.loads(capsys.readouterr().out)
    assert document["manifest"]["kernel_version"] == "9.9-none"
    manifest = read_manifest(tmp_path / "out" / "manifest.json")
    assert [file.name for file in manifest.outputs] == ["initrd.img", "vmlinux"]


def test_guest_build_names_a_missing_agent(capsys: Captured, tmp_path: Path) -> None:
    assert main(["guest", "build", "--agent", str(tmp_path / "absent")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "absent") in error
    assert "Errno" not in error


def run_failing(error: BaseException) -> tuple[int, str]:
    def fail(_arguments: argparse.Namespace, _output: Output) -> int:
        raise error

    stderr = io.StringIO()
    output = Output(is_json=False, stdout=io.StringIO(), stderr=stderr)
    return run(argparse.Namespace(run=fail), output), stderr.getvalue()


def test_causes_are_joined_and_not_repeated() -> None:
    error = InvalidArgumentError("outer: why")
    error.__cause__ = ValueError("why")
    error.__cause__.__cause__ = ValueError("deeper")
    assert run_failing(error) == (1, "kata-hybrid: outer: why: deeper\n")


def test_an_os_error_names_the_file() -> None:
    status, text = run_failing(PermissionError(13, "Permission denied", "/usr/share/x"))
    assert status == 1
    assert text == "kata-hybrid: /usr/share/x: Permission denied (are you root?)\n"


def test_an_interrupt_is_status_130() -> None:
    assert run_failing(KeyboardInterrupt())[0] == 130


def test_an_error_names_the_next_step() -> None:
    error = FailedPreconditionError("lz4 is not installed: apt-get install lz4")
    assert "apt-get install lz4" in run_failing(error)[1]


def test_every_command_has_help() -> None:
    assert all(name in make_parser().format_help() for name in ("check", "guest", "env", "version"))
