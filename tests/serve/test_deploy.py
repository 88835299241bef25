"""The files of deploy/ against the server: paths, ports, flags, variables and times that have to agree."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

import twofold
from tests.serve.test_replicas import haproxy
from twofold.cli import app as commands
from twofold.serve import ServeSettings, create_app
from twofold.serve.settings import KEYS_VARIABLE, PREFIX

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SETTINGS = {PREFIX + name.upper() for name in ServeSettings.model_fields} | {KEYS_VARIABLE}
PORT = 8000


@pytest.fixture
def paths(text_model):
    """Of the app, that are asked without a key."""
    app = create_app(
        {"pair": twofold.Engine(text_model(), device="cpu", backend="torch")},
        ServeSettings(key_hashes=("0" * 64,)),
    )
    return {path for path in app.openapi()["paths"] if app.state.service.is_public(path)}


@pytest.fixture(scope="module")
def flags():
    """Of `twofold serve`."""
    command = typer.main.get_command(commands).commands["serve"]
    return {flag for parameter in command.params for flag in parameter.opts}


@pytest.fixture(scope="module")
def dockerfile():
    """Stages: [(instruction, arguments)], continued lines joined; the last is what is built."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    stages = []
    for instruction, arguments in lines:
        if instruction == "FROM":
            stages.append([])
        if stages:
            stages[-1].append((instruction, " ".join(arguments.split())))
    return stages


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def kubernetes():
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


def used_flags(words):
    return {word for word in words if word.startswith("--")}


class TestDockerfile:
    def test_stages(self, dockerfile):
        names = [stage[0][1].split(" AS ")[-1] for stage in dockerfile]
        assert names == ["build", "serve", "with-model", "serve"]
        for stage in dockerfile[2:]:
            assert stage[0][1].split()[0] == "serve"
        for image in (stage[0][1].split()[0] for stage in dockerfile[:2]):
            assert re.fullmatch(r"python:\$\{PYTHON\}-slim", image)

    def test_what_is_copied_exists_and_is_let_in(self, dockerfile):
        ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        assert ignored[0] == "*"
        for instruction, arguments in dockerfile[0]:
            if instruction == "COPY":
                for name in arguments.split()[:-1]:
                    assert (ROOT / name).exists()
                    assert f"!{name}" in ignored

    def test_extras_and_constraints_exist(self, dockerfile):
        defaults = dict(a.split("=", 1) for i, a in dockerfile[0] if i == "ARG")
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(defaults["EXTRAS"].split(",")) <= set(extras)
        named = re.findall(r"--build-arg EXTRAS=([\w,]+)", (DEPLOY / "Dockerfile").read_text())
        assert named
        assert set(",".join(named).split(",")) <= set(extras)
        assert (ROOT / defaults["CONSTRAINTS"]).exists()

    def test_the_server_runs_without_rights_and_is_watched(self, dockerfile, paths, flags):
        serve = dockerfile[1]
        instructions = [instruction for instruction, _ in serve]
        user = dict(serve)["USER"]
        assert user.isdecimal()
        assert int(user) > 0
        assert f"--uid {user} " in next(a for i, a in serve if i == "RUN")
        assert max(i for i, name in enumerate(instructions) if name in ("RUN", "COPY")) < instructions.index(
            "USER"
        )
        entrypoint = json.loads(dict(serve)["ENTRYPOINT"])
        assert entrypoint[:2] == ["twofold", "serve"]
        assert used_flags(entrypoint) <= flags
        assert entrypoint[entrypoint.index("--port") + 1] == dict(serve)["EXPOSE"] == str(PORT)
        assert entrypoint[entrypoint.index("--host") + 1] == "0.0.0.0"
        host, port, path = re.search(r"http://([\d.]+):(\d+)(/\w+)", dict(serve)["HEALTHCHECK"]).groups()
        assert (host, port) == ("127.0.0.1", str(PORT))
        assert path in paths
        check = json.loads(dict(serve)["HEALTHCHECK"].partition("CMD ")[2])
        compile(check[2], "healthcheck", "exec")

    def test_no_secret_is_built_in(self, dockerfile):
        for stage in dockerfile:
            for instruction, arguments in stage:
                assert instruction not in ("ADD", "MAINTAINER")
                assert not re.search(r"key|token|secret|password", arguments, re.I)
                assert not re.match(r"curl|wget", arguments)


class TestCompose:
    def test_replicas(self, compose, flags):
        services = compose["services"]
        replicas = [services[name] for name in ("twofold-1", "twofold-2")]
        assert replicas[0] == replicas[1]
        for replica in replicas:
            assert used_flags(replica["command"]) <= flags
            assert set(replica["environment"]) <= SETTINGS
            drain_s = float(replica["environment"][PREFIX + "DRAIN_S"])
            assert seconds(replica["stop_grace_period"]) >= drain_s + 10
            assert "ports" not in replica  # only the proxy is reached from outside
            assert replica["volumes"][0].endswith(":/model:ro")
            assert replica["command"][0] == "/model"
            assert (DEPLOY / replica["build"]["context"]).resolve() == ROOT
            assert (ROOT / replica["build"]["dockerfile"]).exists()

    def test_proxy(self, compose):
        proxy = compose["services"]["proxy"]
        assert proxy["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
        assert set(proxy["depends_on"]) == {"twofold-1", "twofold-2"}
        source, _, _ = proxy["volumes"][0].partition(":")
        assert (DEPLOY / source).exists()


class TestProxy:
    TEXT = (DEPLOY / "haproxy.cfg").read_text()

    def test_it_knows_the_replicas_and_asks_a_path_that_exists(self, compose, paths):
        servers = re.findall(r"^  server (\S+) (\S+):(\d+)", self.TEXT, re.M)
        assert [(name, host) for name, host, _ in servers] == [(f"twofold-{n}",) * 2 for n in (1, 2)]
        assert {port for *_, port in servers} == {str(PORT)}
        assert {name for name, *_ in servers} < set(compose["services"])
        assert re.search(r"option httpchk GET (\S+)", self.TEXT)[1] in paths
        assert f"bind :{PORT}" in self.TEXT

    def test_it_waits_longer_than_the_server(self):
        for side in ("client", "server"):
            found = re.search(rf"timeout {side} (\w+)", self.TEXT)[1]
            assert seconds(found) > ServeSettings().timeout_s

    @pytest.mark.skipif(haproxy() is None, reason="HAProxy is not installed")
    def test_haproxy_accepts_it(self):
        checked = subprocess.run(
            [haproxy(), "-c", "-f", DEPLOY / "haproxy.cfg"], capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stderr


class TestKubernetes:
    def test_names_and_labels_fit_together(self, kubernetes):
        deployment, service = kubernetes["Deployment"], kubernetes["Service"]
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        for selector in (
            deployment["spec"]["selector"]["matchLabels"],
            service["spec"]["selector"],
            kubernetes["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        ):
            assert selector.items() <= labels.items()
        target = kubernetes["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
        assert target == {
            "apiVersion": deployment["apiVersion"],
            "kind": "Deployment",
            "name": deployment["metadata"]["name"],
        }
        (port,) = container(kubernetes)["ports"]
        assert (port["name"], port["containerPort"]) == (service["spec"]["ports"][0]["targetPort"], PORT)

    def test_probes_ask_paths_that_exist(self, kubernetes, paths):
        found = container(kubernetes)
        for name, path in (("startup", "/ready"), ("readiness", "/ready"), ("liveness", "/health")):
            probe = found[f"{name}Probe"]["httpGet"]
            assert probe["path"] == path
            assert path in paths
            assert probe["port"] == found["ports"][0]["name"]

    def test_flags_and_variables_exist(self, kubernetes, flags):
        found = container(kubernetes)
        assert used_flags(found["args"]) <= flags
        variables = {variable["name"]: variable for variable in found["env"]}
        assert set(variables) <= SETTINGS
        assert "value" not in variables[KEYS_VARIABLE]
        assert set(variables[KEYS_VARIABLE]["valueFrom"]) == {"secretKeyRef"}
        assert "Secret" not in kubernetes

    def test_a_pod_has_time_to_end(self, kubernetes):
        pod = kubernetes["Deployment"]["spec"]["template"]["spec"]
        found = container(kubernetes)
        (command, pause_s) = found["lifecycle"]["preStop"]["exec"]["command"]
        assert command == "sleep"
        probe = found["readinessProbe"]
        assert float(pause_s) > probe["periodSeconds"] * probe["failureThreshold"]
        drain_s = float(next(v["value"] for v in found["env"] if v["name"] == PREFIX + "DRAIN_S"))
        assert pod["terminationGracePeriodSeconds"] >= float(pause_s) + drain_s + 10

    def test_updates_and_evictions_leave_somebody(self, kubernetes):
        spec = kubernetes["Deployment"]["spec"]
        assert spec["replicas"] >= 2
        assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        assert kubernetes["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
        assert kubernetes["HorizontalPodAutoscaler"]["spec"]["minReplicas"] >= 2

    def test_it_runs_without_rights(self, kubernetes, dockerfile):
        pod, found = kubernetes["Deployment"]["spec"]["template"]["spec"], container(kubernetes)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert str(pod["securityContext"]["runAsUser"]) == dict(dockerfile[1])["USER"]
        assert pod["enableServiceLinks"] is False  # TWOFOLD_* would be taken for settings
        rights = found["securityContext"]
        assert (rights["allowPrivilegeEscalation"], rights["readOnlyRootFilesystem"]) == (False, True)
        assert rights["capabilities"] == {"drop": ["ALL"]}
        mounts = {mount["mountPath"]: mount for mount in found["volumeMounts"]}
        assert set(mounts) == {found["args"][0], "/tmp"}
        assert mounts["/model"]["readOnly"] is True
        assert {mount["name"] for mount in found["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        caches = shlex.split(dict(dockerfile[1])["ENV"])
        assert all(c.split("=")[1].startswith("/tmp/") for c in caches if "CACHE" in c)


def container(kubernetes):
    (found,) = kubernetes["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


def seconds(text):
    """Of "150s", "10m"."""
    number, unit = re.fullmatch(r"(\d+)([sm])", text).groups()
    return float(number) * {"s": 1, "m": 60}[unit]
