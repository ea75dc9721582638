"""`casa-eval-digits --base-url`: whatever answers there, the command ends in one sentence."""

import socket

import pytest

from casa_digits import evaluate
from scripted_endpoint import CHAT_PATH, MODELS, MODELS_PATH, scripted_endpoint

ANSWER = {"choices": [{"message": {"role": "assistant", "content": "1"}}]}


def run(capsys, *arguments):
    """Return the exit status and what was written to stderr as the command's own words."""
    status = evaluate.main(["--scale", "0.01", *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("casa-eval-digits: ")]
    return status, "\n".join(lines)


def one_sentence(words, *expected):
    assert len(words.splitlines()) == 1
    assert len(words) < 700
    for word in expected:
        assert word in words, words


def test_a_server_that_is_not_there(capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    status, words = run(capsys, "--base-url", url)
    assert status == 1
    one_sentence(words, url, "make serve", "refused")


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "ftp://127.0.0.1/v1", "http://", "http://[::1", "http://a:b/v1"])
def test_what_is_no_address(capsys, url):
    status, words = run(capsys, "--base-url", url)
    assert status == 1
    one_sentence(words, repr(url), "http://127.0.0.1:8000/v1")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ((401, {"error": {"message": "Unauthorized"}}), "--api-key"),
        ((403, b"go away"), "--api-key"),
        ((404, {"detail": "Not Found"}), "usually ends in /v1"),
        ((400, {"error": {"message": "That is wrong."}}), "That is wrong."),
        ((500, b"x" * 5000), "Error code: 500"),
        ((503, b""), "Error code: 503"),
        ((200, b"<html>A page for people</html>"), "no OpenAI-compatible server"),
        ((200, b""), "no OpenAI-compatible server"),
        ((200, b'{"object": "list", "da'), "no OpenAI-compatible server"),
        ((200, {}), "no OpenAI-compatible server"),
        ((200, []), "no OpenAI-compatible server"),
        ((200, {"data": None}), "no OpenAI-compatible server"),
        ((200, {"data": [{}]}), "no OpenAI-compatible server"),
        ((200, {"data": []}), "serves no model"),
        ((302, b""), "Error code: 302"),
    ],
)
def test_answers_to_the_list_of_models(capsys, reply, expected):
    with scripted_endpoint({MODELS_PATH: reply}) as (url, _):
        status, words = run(capsys, "--base-url", url)
    assert status == 1
    one_sentence(words, url, expected)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ((401, {"error": {"message": "Unauthorized"}}), "--api-key"),
        ((404, {"error": {"message": "no chat here"}}), "/v1/chat/completions"),
        ((200, b"<html></html>"), "no OpenAI-compatible server"),
        ((200, {"choices": []}), "no OpenAI-compatible server"),
        ((200, {"choices": [{"text": "1"}]}), "no OpenAI-compatible server"),
        ((200, {"choices": [{"message": {"content": {"a": 1}}}]}), "no OpenAI-compatible server"),
        ((200, b'{"choices": [{"message": {"conte'), "no OpenAI-compatible server"),
        ((200, ANSWER, 100), "/v1 failed ("),
    ],
)
def test_answers_to_a_question(capsys, reply, expected):
    with scripted_endpoint({MODELS_PATH: (200, MODELS), CHAT_PATH: reply}) as (url, _):
        status, words = run(capsys, "--base-url", url)
    assert status == 1
    one_sentence(words, url, expected)


def test_a_model_that_is_not_served(capsys):
    with scripted_endpoint({MODELS_PATH: (200, MODELS)}) as (url, _):
        status, words = run(capsys, "--base-url", url, "--model", "mine")
    assert status == 1
    one_sentence(words, "'mine'", "'served'", "--model")


def test_the_key_is_sent_and_a_bad_score_is_no_error(capsys):
    with scripted_endpoint({MODELS_PATH: (200, MODELS), CHAT_PATH: (200, ANSWER)}) as (url, seen):
        status, words = run(capsys, "--base-url", url, "--api-key", "secret", "--no-live")
    assert status == 1
    assert words == ""
    assert {asked.key for asked in seen} == {"Bearer secret"}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--seed=-1", "--seed is -1; expected 0 or more"),
        ("--threads=0", "--threads is 0; expected 1 or more"),
        ("--scale=nan", "--scale is nan; expected"),
        ("--scale=inf", "--scale is inf; expected"),
        ("--scale=0", "--scale is 0.0; expected"),
        ("--min-read=2", "--min-read is 2.0; expected 0 to 1"),
        ("--min-before=nan", "--min-before is nan; expected 0 to 1"),
    ],
)
def test_bad_options_are_named(capsys, monkeypatch, option, expected):
    monkeypatch.setattr(evaluate, "EagerRunner", lambda checkpoint: pytest.fail("loaded the model"))
    status, words = run(capsys, option)
    assert status == 1
    one_sentence(words, expected)


def test_ctrl_c_is_one_sentence(capsys, monkeypatch):
    def interrupt(checkpoint):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "EagerRunner", interrupt)
    status, words = run(capsys)
    assert status == 1
    one_sentence(words, "interrupted")


def test_a_checkpoint_that_is_none(capsys, tmp_path):
    status, words = run(capsys, str(tmp_path / "nothing"))
    assert status == 1
    one_sentence(words, "nothing")
