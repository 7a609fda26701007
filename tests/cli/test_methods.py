"""`secateur methods NAME`, and `--method NAME --help`."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.methods import find_method, method_names


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "80"})
    return result.exit_code, result.stdout, result.stderr


def words(text: str) -> str:
    """The words of a table without its lines, so that they can be found across the breaks of cells."""
    return " ".join(re.sub(r"[^\x00-\x7f]", " ", text).split())


@pytest.mark.parametrize("name", method_names())
def test_every_option_of_every_method_says_what_it_means(name: str) -> None:
    described = api.describe_method(name)
    assert [option["name"] for option in described["options"] if not option["meaning"]] == []
    assert described["paper"].startswith("https://"), "the docstring names the paper"
    assert described["options"] == json.loads(json.dumps(described["options"]))


@pytest.mark.parametrize("name", method_names())
def test_one_method_is_shown_with_its_options(name: str) -> None:
    status, stdout, _ = run("methods", name)
    assert status == 0
    assert find_method(name).summary.split()[-1] in stdout
    for option in api.describe_method(name)["options"]:
        assert re.search(rf"^. {option['name']} ", stdout, re.MULTILINE), option
    assert all(len(line) <= 80 for line in stdout.splitlines())


def test_defaults_patterns_and_calibration_are_those_of_the_file() -> None:
    described = api.describe_method("llm_surgeon")
    assert described["patterns"].keys() == {"unstructured", "N:M", "rows"}, "columns are refused"
    assert (described["pattern"], described["sparsity_of"]) == ("rows", "all parameters")
    assert described["patterns"]["unstructured"] == "the weights of the targeted matrices"
    assert described["calibration"] == {"spec": "wikitext2", "samples": 128, "seqlen": 2048}
    assert {option["name"]: option["default"] for option in described["options"]}["damping"] == 0.01
    assert api.describe_method("magnitude")["calibration"] is None
    _, stdout, _ = run("methods", "llm_surgeon")
    assert "N:M: a fraction of the weights" in words(stdout), "not an emoji"
    assert "128 windows of 2,048 tokens of wikitext2" in words(stdout)
    assert "update │ true" in re.sub(" +", " ", stdout), "as --set takes it"


def test_json_is_one_object() -> None:
    status, stdout, _ = run("methods", "wanda", "--json")
    assert status == 0
    assert json.loads(stdout) == {"command": "methods", **api.describe_method("wanda")}


@pytest.mark.parametrize("name", ["wonda", "WANDA", "Wanda "])
@pytest.mark.parametrize("command", [("methods",), ("prune", "--help", "--method"), ("sweep", "-h", "--method")])
def test_an_unknown_name_is_refused_with_a_suggestion(command: tuple[str, ...], name: str) -> None:
    status, stdout, stderr = run(*command, name)
    assert (status, stdout) == (2, "")
    assert f"unknown method '{name}'; did you mean wanda?" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ("prune", "--method", "wanda", "--help"),
        ("prune", "-h", "--method=wanda"),
        ("prune", "bundled", "--method", "wanda", "--sparsity", "half", "-h"),
        ("sweep", "--method", "wanda", "--help"),
        ("study", "modules", "--method", "wanda", "--help"),
    ],
)
def test_help_with_a_method_shows_its_options_after_the_usual_help(args: tuple[str, ...]) -> None:
    status, stdout, _ = run(*args)
    assert status == 0
    usual, _, own = stdout.partition("options of wanda: --set OPTION=VALUE")
    assert "Show this message and exit" in words(usual)
    assert "scope" in own


@pytest.mark.parametrize("args", [("prune", "--help"), ("prune", "--method", "--help")])
def test_help_without_a_name_is_the_usual_help(args: tuple[str, ...]) -> None:
    status, stdout, _ = run(*args)
    assert status == 0
    assert "Show this message and exit" in words(stdout)
    assert "options of" not in stdout


def test_the_list_shows_the_result_and_the_needs_of_every_method() -> None:
    status, stdout, stderr = run("methods")
    assert status == 0
    assert all(len(line) <= 80 for line in stdout.splitlines())
    head, *rows = [line.rstrip() for line in stdout.splitlines() if line[0] != " "]
    assert re.split("  +", head) == ["method", "result", "needs", "what it does"]
    found = {name: tuple(cells[:2]) for name, *cells in (re.split("  +", row) for row in rows)}
    assert set(found) == set(method_names())
    assert found["magnitude"] == ("zeros or smaller", "nothing")
    assert found["llm_surgeon"] == ("smaller or zeros", "training"), "its default comes first"
    assert found["sparsegpt"] == ("zeros", "text")
    assert found["llm_pruner"] == ("smaller", "gradients")
    assert "`secateur methods NAME`" in stderr
    assert stderr.splitlines()[-1].endswith("docs/which-method.md")


def test_the_json_of_the_list_has_the_same_facts() -> None:
    _, stdout, _ = run("methods", "--json")
    record = json.loads(stdout)
    assert record["methods"] == api.methods()
    assert record["facts"].keys() == set(method_names())
    for name, facts in record["facts"].items():
        described = api.describe_method(name)
        assert facts == {key: described[key] for key in ("result", "results", "needs")}
    assert record["facts"]["wanda"]["results"]["rows"] == "smaller"


def test_one_method_says_which_pattern_makes_the_file_smaller() -> None:
    _, stdout, _ = run("methods", "llm_surgeon")
    said = words(stdout)
    assert "result smaller: parameters are removed (--pattern rows); zeros: the same size," in said
    _, stdout, _ = run("methods", "shortgpt")
    assert "result smaller: parameters are removed sparsity" in words(stdout)


def test_the_help_of_a_method_points_to_its_page() -> None:
    _, stdout, _ = run("prune", "--help")
    assert "`secateur methods NAME`" in re.sub(r"NAME +A method", "", words(stdout))


@pytest.mark.parametrize("command", ["heal", "eval", "generate"])
def test_switches_leave_the_meanings_their_width(command: str) -> None:
    """The two names of a switch in columns of their own would leave heal 21 of 80 columns."""
    _, stdout, _ = run(command, "--help")
    assert re.search(r"--\[no-\](eval|shift|chat) ", stdout)
    rows = [line for line in stdout.splitlines() if "--device" in line or "--limit" in line or "--chat" in line]
    starts = [line.index("auto, cpu") for line in rows if "auto, cpu" in line]
    assert starts
    assert max(starts) <= 45
    assert run(command, "--no-such")[0] == 2
