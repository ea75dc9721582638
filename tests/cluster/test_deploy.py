"""What lies in deploy/ fits together: with this package, with Ray's schemas, and each file with the others."""

import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.schema import ServeDeploySchema

from casa_serving.cluster import launch
from casa_serving.cluster.config import parse_config
from casa_serving.cluster.config_file import read_file

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SERVE_CONFIGS = ("cluster.yaml", "cluster-gpu.yaml", "embedded.yaml")
# Each RayService and the Serve config that it holds.
MANIFESTS = {"kuberay-cpu.yaml": "cluster.yaml", "kuberay-gpu.yaml": "cluster-gpu.yaml"}
# With a small Ray of its own instead of the one that the command would start with everything on.
SERVE_BUILD = """
import sys
import ray
from ray.serve.scripts import cli
ray.init(address="local", num_cpus=1, num_gpus=0, include_dashboard=False)
cli(["build", "casa_serving.cluster.embedded:app", "-o", sys.argv[1]])
"""


def load(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def groups(manifest):
    """The head and the only group of workers."""
    cluster = manifest["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"], workers


def pod(group):
    return group["template"]["spec"]


def container(group):
    (only,) = pod(group)["containers"]
    return only


# Serve configs


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_ray_serve_takes_the_config(name):
    ServeDeploySchema.model_validate(load(name))


@pytest.mark.parametrize("name", MANIFESTS.values())
def test_this_package_takes_the_config(name):
    loaded = read_file(DEPLOY / name)
    parse_config(loaded.args)
    assert loaded.http_options == {"host": "0.0.0.0", "port": 8000}


def test_serve_build_writes_the_shipped_config(tmp_path):
    written = tmp_path / "embedded.yaml"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", SERVE_BUILD, str(written)]
    subprocess.run(command, env=environment | launch.ENVIRONMENT, cwd=tmp_path, check=True, timeout=300)
    # As data: the order of keys changes from run to run.
    assert yaml.safe_load(written.read_text()) == load("embedded.yaml"), (
        "write it anew: serve build casa_serving.cluster.embedded:app -o deploy/embedded.yaml"
    )


def code_version(config):
    """What Ray Serve compares to find out whether everything starts anew."""
    return get_app_code_version(ServeDeploySchema.model_validate(config).applications[0])


def test_fixing_the_number_of_replicas_as_the_page_says_is_no_new_code():
    (block,) = re.findall(r"^```yaml override\n(.*?)^```", (ROOT / "docs" / "cluster.md").read_text(), re.M | re.S)
    changed = load("cluster.yaml")
    changed["applications"][0] |= yaml.safe_load(block)["applications"][0]
    assert code_version(changed) == code_version(load("cluster.yaml"))


def test_bounds_in_a_file_that_has_all_of_scaling_are_no_new_code():
    changed = load("embedded.yaml")
    scaling = changed["applications"][0]["deployments"][0]["autoscaling_config"]
    scaling |= {"min_replicas": 2, "max_replicas": 6}
    assert code_version(changed) == code_version(load("embedded.yaml"))


def test_single_keys_of_scaling_are_what_the_page_warns_of():
    changed = load("cluster.yaml")
    scaling = {"min_replicas": 2, "max_replicas": 6}
    changed["applications"][0]["deployments"] = [{"name": "CasaServer:x", "autoscaling_config": scaling}]
    assert code_version(changed) != code_version(load("cluster.yaml"))


# KubeRay


@pytest.mark.parametrize(("name", "config"), MANIFESTS.items())
def test_a_manifest_holds_the_serve_config(name, config):
    assert yaml.safe_load(load(name)["spec"]["serveConfigV2"]) == load(config)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_what_kuberay_requires(name):
    # `required` in KubeRay 1.7.0's ray.io_rayservices.yaml, and Ray's version as installed.
    manifest = load(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    head, workers = groups(manifest)
    assert "template" in head
    assert {"groupName", "maxReplicas", "minReplicas", "template"} <= workers.keys()
    version = manifest["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"ray[serve]=={version}" in PROJECT["optional-dependencies"]["ray"]
    for group in (head, workers):
        # KubeRay hands these to `ray start` as they are: they must be strings.
        assert all(isinstance(value, str) for value in group.get("rayStartParams", {}).values())
        assert {mount["name"] for mount in container(group).get("volumeMounts", ())} == {
            volume["name"] for volume in pod(group).get("volumes", ())
        }


def validate_pod(template):
    # `strict` rejects keys that are unknown. The schema of a RayService itself is KubeRay's, which no package has.
    as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    kubernetes_validate.validate(as_pod, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_the_pods(name):
    for group in groups(load(name)):
        validate_pod(group["template"])


@pytest.mark.parametrize("change", [{"securityContextOf": {}}, {"terminationGracePeriodSeconds": "150"}])
def test_kubernetes_schema_rejects_what_is_no_pod(change):
    _, workers = groups(load("kuberay-cpu.yaml"))
    workers["template"]["spec"] |= change
    with pytest.raises(kubernetes_validate.ValidationError):
        validate_pod(workers["template"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_workers_hold_exactly_the_replicas(name):
    manifest = load(name)
    config = parse_config(yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"][0]["args"])
    head, workers = groups(manifest)
    limits = container(workers)["resources"]["limits"]
    cpus = float(workers["rayStartParams"].get("num-cpus", limits["cpu"]))
    gpus = float(limits.get("nvidia.com/gpu", 0))
    size = config.tensor_parallel_size
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert gpus == (size if config.device == "gpu" else 0)
    assert cpus >= size * config.cpus + config.ingress.replicas * config.ingress.cpus
    # A second replica must not fit beside the first one.
    assert min(cpus / (size * config.cpus), gpus / size if gpus else float("inf")) < 2
    assert (workers["minReplicas"], workers["maxReplicas"]) == (config.replicas.min, config.replicas.max)
    # The nodes come after the application is built.
    assert config.wait_for_nodes


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_worker_that_goes_may_finish_its_answers(name):
    manifest = load(name)
    config = parse_config(yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"][0]["args"])
    _, workers = groups(manifest)
    shell, flag, script = container(workers)["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("bash", "-c")
    drain, sleep = script.split(" && ")
    ray, command, *options = shlex.split(drain)
    assert ray == "ray"
    # Raises where an option or its value is not Ray's.
    deadline_s = ray_cli.commands[command].make_context(command, options).params["deadline_remaining_seconds"]
    assert sleep.split() == ["sleep", str(deadline_s)]
    # Another replica must start within the rest of the deadline.
    assert deadline_s >= config.replicas.drain_timeout_s + 60
    assert pod(workers)["terminationGracePeriodSeconds"] > deadline_s
    assert manifest["spec"]["rayClusterDeletionDelaySeconds"] >= config.replicas.drain_timeout_s


def test_every_node_finds_the_checkpoint():
    manifest = load("kuberay-gpu.yaml")
    checkpoint = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"][0]["args"]["checkpoint"]
    for group in groups(manifest):
        mounted = {mount["name"]: mount for mount in container(group)["volumeMounts"]}["checkpoint"]
        assert (mounted["mountPath"], mounted["readOnly"]) == (checkpoint, True)
        (volume,) = pod(group)["volumes"]
        assert volume["persistentVolumeClaim"]["readOnly"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_prometheus_finds_the_ports(name):
    monitored = {endpoint["port"] for endpoint in load("podmonitor.yaml")["spec"]["podMetricsEndpoints"]}
    head, workers = ({port["name"] for port in container(group)["ports"]} for group in groups(load(name)))
    assert monitored <= head
    assert monitored & workers == {"metrics"}


def test_prometheus_reads_rays_own_file_and_the_default_port():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    cluster, one_machine = load("prometheus.yaml")["scrape_configs"][1:]
    (path,) = cluster["file_sd_configs"][0]["files"]
    assert path == f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"
    port = launch.build_parser().parse_args([]).metrics_port
    assert one_machine["static_configs"][0]["targets"] == [f"127.0.0.1:{port}"]


# The container


def instructions(name="Containerfile"):
    """The file's instructions and arguments, lines put together and comments left out."""
    lines = [line for line in (DEPLOY / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def test_hadolint_finds_nothing_in_the_container():
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "--no-color", DEPLOY / "Containerfile"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_container_copies_what_is_there_and_what_its_ignore_file_lets_through():
    copied = [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]
    ignore = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    let_through = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    assert "*" in ignore
    assert sorted(copied) == sorted(let_through)
    assert all((ROOT / source).exists() for source in copied)


def test_the_container_installs_what_the_project_names():
    text = (DEPLOY / "Containerfile").read_text()
    extras = PROJECT["optional-dependencies"]
    for device in ("cpu", "cuda"):
        assert f"#   DEVICE={device} " in text
        assert device in extras
    (installed,) = re.findall(r"\.\[\$\{DEVICE\},([\w,]+)\]", text)
    assert set(installed.split(",")) <= extras.keys() - {"dev", "export", "trt"}
    assert '"locks/${DEVICE}.txt" >constraints.txt' in text
    assert 'pip install --constraint constraints.txt ".[' in text
    (torch,) = re.findall(r"torch==[\d.]+(?=\+cpu)", text)
    assert torch in extras["cpu"]
    # The rooms that setuptools looks into must be folders even before the code is copied.
    (made,) = re.findall(r"mkdir ([\w ]+?) *\\", text)
    assert {".", *made.split()} == set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["where"]
    )


def test_the_container_runs_a_command_of_the_project_as_somebody_else_than_root():
    last = dict(instructions())
    assert yaml.safe_load(last["CMD"])[0] in PROJECT["scripts"]
    assert int(last["USER"]) > 0
    for name in MANIFESTS:
        for group in groups(load(name)):
            assert pod(group)["securityContext"]["runAsUser"] == int(last["USER"])


def test_nodes_in_the_container_have_the_environment_of_casa_serve():
    variables = [shlex.split(rest) for word, rest in instructions() if word == "ENV"]
    assert launch.ENVIRONMENT.items() <= dict(pair.split("=", 1) for pair in itertools.chain(*variables)).items()
