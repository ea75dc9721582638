"""Which files `casa-serve --ray` takes."""

from pathlib import Path

import pytest

from casa_engine.errors import InputError
from casa_serving.cluster.config_file import ConfigFile, read_file

pytestmark = pytest.mark.unit

APPLICATION = "import_path: casa_serving.cluster:build_app"


def test_a_serve_config_file_gives_its_arguments_and_address(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(
        "http_options: {port: 9000}\nproxy_location: HeadOnly\n"
        f"applications: [{{name: a, {APPLICATION}, args: {{cpus: 2}}}}]\n"
    )
    assert read_file(path) == ConfigFile({"cpus": 2}, {"port": 9000}, "HeadOnly")


def test_a_plain_file_is_the_configuration_itself(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("cpus: 2\n")
    assert read_file(path) == ConfigFile({"cpus": 2})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "not a mapping"),
        ("a: [", "cannot be read"),
        ("applications: []", "exactly one application"),
        (f"{{grpc_options: {{}}, applications: [{{{APPLICATION}}}]}}", "grpc_options"),
        (f"applications: [{{{APPLICATION}, runtime_env: {{}}}}]", "runtime_env"),
        ("applications: [{import_path: 'other:app'}]", "has other:app at /"),
        (f"applications: [{{{APPLICATION}, route_prefix: /casa}}]", "at /casa"),
        (f"{{http_options: {{prot: 1}}, applications: [{{{APPLICATION}}}]}}", "['prot'] in http_options"),
        (f"{{http_options: {{port: many}}, applications: [{{{APPLICATION}}}]}}", "port: "),
        (f"{{http_options: {{port: 70000}}, applications: [{{{APPLICATION}}}]}}", "port from 0 to 65535, got 70000"),
        (f"{{http_options: {{port: -1}}, applications: [{{{APPLICATION}}}]}}", "port from 0 to 65535, got -1"),
        (f"{{http_options: 8000, applications: [{{{APPLICATION}}}]}}", "8000 in http_options"),
        (f"{{proxy_location: Here, applications: [{{{APPLICATION}}}]}}", "'Here', expected one of "),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, said):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_file(path)
    assert said in str(caught.value)


def test_a_file_that_is_missing_is_refused():
    with pytest.raises(InputError, match="cannot be read"):
        read_file(Path("nowhere.yaml"))
