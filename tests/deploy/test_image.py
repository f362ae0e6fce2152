"""The container image: built from a local base, then run the way clusters run it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from pagestream.v1 import generation_pb2 as pb
from tests.deploy.containers import IMAGE, REPOSITORY, Containers
from tests.support.client import SERVING, Client
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow
START = 120.0  # seconds
DEV = REPOSITORY / "deploy" / "kubernetes" / "overlays" / "dev"
POD_CONTAINER = "pagestream-pod-0-pagestream"  # as podman calls it
LOCKED_DOWN = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--memory", "2g")


@pytest.fixture(scope="module")
def containers(tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    for program in ("buildah", "podman", "runc", "mmdebstrap"):
        tool(program)
    if os.geteuid() != 0:
        pytest.skip("containers are built and run as root here")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pagestream" / "test-images"
    containers = Containers(tmp_path_factory.mktemp("containers"), cache)
    try:
        containers.build_image()
        yield containers
    finally:
        containers.remove()


@pytest.fixture
def server(containers: Containers, tiny_model_path: Path, tmp_path: Path) -> Iterator[str]:
    """The name of a running container that serves the tiny model, with an address on loopback."""
    model = shutil.copytree(tiny_model_path, tmp_path / "tiny")
    for file in (model, *model.iterdir()):
        file.chmod(0o755)  # for a user who is not us
    mount = ("--volume", f"{model}:/models/tiny:ro", "--publish", "127.0.0.1::50051")
    serve = ("serve", "/models/tiny", "--host", "0.0.0.0", "--dtype", "fp32", "--threads", "1")  # noqa: S104 - in there
    containers("podman", "run", "--detach", "--name", "server", *LOCKED_DOWN, *mount, IMAGE, *serve)
    yield "server"
    sys.stdout.write(containers("podman", "logs", "server", stderr=subprocess.STDOUT))  # shown if the test fails
    containers("podman", "rm", "--force", "--time", "0", "server")


def is_ready(containers: Containers, container: str, client: Client) -> bool:
    assert containers("podman", "inspect", "--format", "{{.State.Running}}", container) == "true"
    try:
        return client.health() == SERVING
    except grpc.RpcError:
        return False


def connect(containers: Containers, container: str) -> Client:
    client = Client(containers("podman", "port", container, "50051"))
    wait_until(lambda: is_ready(containers, container, client), "the server is ready", START)
    return client


def test_what_is_in_it(containers: Containers, record_property: Callable[[str, object], None]) -> None:
    (image,) = json.loads(containers("podman", "image", "inspect", IMAGE))
    history = containers("podman", "history", "--format", "{{.Size}}\t{{.CreatedBy}}", "--no-trunc", IMAGE)
    layers = [line for line in history.splitlines() if not line.startswith("0 B")]
    record_property("image", f"{image['Size'] / 1e6:.0f} MB in {len(image['RootFS']['Layers'])} layers")
    for line in layers:
        record_property("layer", line[:120])
    assert image["Size"] < 1e9
    assert image["Config"]["User"] == "10001:10001"
    assert image["Config"]["Entrypoint"] == ["pagestream"]
    assert image["Healthcheck"]["Test"] == ["CMD", "pagestream", "health"]


def test_it_holds_no_compiler_no_headers_and_no_model(containers: Containers) -> None:
    look = (
        "for tool in gcc cc g++ c++ cpp clang ld as nvcc make; do command -v $tool; done;"
        "find /usr/include /opt /var/cache -name '*.h' -o -name '*.hpp' -o -name '*.a' -o -name '*.gguf'"
    )
    run = ("podman", "run", "--rm", "--network", "none", *LOCKED_DOWN, "--entrypoint", "sh", IMAGE, "-c")
    assert containers(*run, look, check=False) == ""


def test_it_speaks_to_gateways_and_to_opentelemetry(containers: Containers) -> None:
    """The extras `gateway` and `otel`: what serves without them only warns."""
    look = "import pagestream.server.vllm_service, pagestream.server.tracing"
    run = ("podman", "run", "--rm", "--network", "none", *LOCKED_DOWN, "--entrypoint", "python", IMAGE, "-c")
    assert containers(*run, look) == ""


@pytest.mark.parametrize("isa", ["auto", "avx512", "avx2", "baseline"])
def test_the_kernels_are_there_for_every_cpu(containers: Containers, isa: str) -> None:
    look = "from pagestream.kernels import build; print(*build._isas()); print(build.load().implementation)"
    run = ("podman", "run", "--rm", "--network", "none", *LOCKED_DOWN, "--env", f"PAGESTREAM_CPU_ISA={isa}")
    try:
        said = containers(*run, "--entrypoint", "python", IMAGE, "-W", "error", "-c", look)
    except AssertionError as error:
        assert "which this CPU does not have" in str(error)  # noqa: PT017
        pytest.skip(f"this CPU has no {isa}")
    assert said.endswith("cpp")


def test_it_serves_locked_down_and_drains_when_stopped(containers: Containers, server: str) -> None:
    probe = ("podman", "exec", server, "pagestream", "health")
    client = connect(containers, server)
    assert containers(*probe) == "SERVING"
    assert containers("podman", "healthcheck", "run", server) == ""
    assert containers("podman", "exec", server, "id", "-u") == "10001"
    assert "Read-only" in containers("podman", "exec", server, "sh", "-c", "touch /opt/x 2>&1", check=False)
    stream = client.open(text="x", stop=pb.StopConfig(max_tokens=1500, ignore_eos=True))
    next(stream)
    with subprocess.Popen(["podman", "stop", "--time", "60", server], env=containers.environment) as stopping:
        assert list(stream)[-1].finished.usage.output_tokens == 1500
        assert stopping.wait(START) == 0
    client.close()
    assert containers("podman", "inspect", "--format", "{{.State.ExitCode}}", server) == "0"
    assert "draining" in containers("podman", "logs", server, stderr=subprocess.STDOUT)


def test_the_first_process_heeds_sigterm_before_it_serves(containers: Containers, server: str) -> None:
    """The kernel keeps a signal from process 1 that it has not asked for: a stop would wait for its whole grace."""
    status = Path("/proc") / containers("podman", "inspect", "--format", "{{.State.Pid}}", server) / "status"

    def heeds() -> bool:
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (15 - 1) & 1)

    wait_until(heeds, "SIGTERM is caught", START)
    containers("podman", "kill", "--signal", "TERM", server)
    assert containers("podman", "wait", server, timeout=300) == "0"


@pytest.fixture
def pod(
    containers: Containers, tool: Callable[[str], str], default_model_path: Path, tmp_path: Path
) -> Iterator[dict[str, Any]]:
    """The Deployment of the dev overlay, running as it stands but for its ports; the volume holds the model already."""
    objects = list(yaml.safe_load_all(containers(tool("kubectl"), "kustomize", str(DEV))))
    deployment = next(one for one in objects if one["kind"] == "Deployment")
    for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port["hostPort"] = free.getsockname()[1]
    claim = next(one for one in objects if one["kind"] == "PersistentVolumeClaim")["metadata"]["name"]
    containers("podman", "volume", "create", claim)
    volume = Path(containers("podman", "volume", "inspect", "--format", "{{.Mountpoint}}", claim))
    (volume / "models").mkdir()
    shutil.copy(default_model_path, volume / "models")
    file = tmp_path / "dev.yaml"  # podman would create the claimed volume, and fails where there is one
    file.write_text(yaml.safe_dump_all(one for one in objects if one["kind"] != "PersistentVolumeClaim"))
    containers("podman", "kube", "play", str(file))
    yield deployment
    sys.stdout.write(containers("podman", "logs", POD_CONTAINER, stderr=subprocess.STDOUT))
    containers("podman", "kube", "down", str(file))
    assert containers("podman", "ps", "--all", "--quiet") == ""


def test_the_dev_overlay_runs_and_answers(containers: Containers, pod: dict[str, Any]) -> None:
    client = connect(containers, POD_CONTAINER)
    answer = client.stream(
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="What is the capital of France?")]),
        sampling=pb.SamplingConfig(temperature=0),
        stop=pb.StopConfig(max_tokens=16),
    )
    assert "Paris" in answer.text
    client.close()
    (made,) = json.loads(containers("podman", "inspect", POD_CONTAINER))
    assert made["HostConfig"]["ReadonlyRootfs"] is True
    assert made["HostConfig"]["Memory"] == 2 * 2**30
    status = containers("podman", "exec", POD_CONTAINER, "cat", "/proc/1/status")
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert (facts["Uid"].split()[0], facts["NoNewPrivs"], int(facts["CapEff"], 16)) == ("10001", "1", 0)
