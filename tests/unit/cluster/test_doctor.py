"""`megasd doctor`: run for real on this machine, and against planted faults. What nvidia-smi says
comes from recorded text, named where it stands; the GPU lines themselves are judged here and
measured nowhere on a machine without one.
"""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megasd.algo.recipes import RECIPES
from megasd.cluster.doctor import engines, gpus, host, nvidia_smi, packages, storage
from megasd.cluster.doctor.checks import checks
from megasd.cluster.doctor.report import CheckResult, Machine, redact, run_checks
from megasd.commands import doctor
from megasd.config.load import load_config
from tests.clock import Clock

ROOT = Path(__file__).resolve().parents[3]
# nvidia-smi --query-gpu=index,name,memory.total,memory.used,driver_version,compute_cap
# --format=csv,noheader,nounits: the values are those that a node of 8 H200 published (driver
# 570.211.01), put into this query's columns.
H200 = "".join(f"{i}, NVIDIA H200, 143771, 0, 570.211.01, 9.0\n" for i in range(8))
# nvidia-smi topo -m of a published node record (8 H200, NVSwitch), its GPU columns and two NICs;
# the header underlined by ANSI codes.
NVSWITCH = (
    "\t\x1b[4m"
    + "\t".join([f"GPU{i}" for i in range(8)] + ["NIC0", "NIC1", "CPU Affinity", "NUMA Affinity"])
    + "\x1b[0m\n"
)
NVSWITCH += "".join(
    f"GPU{i}\t" + "\t".join(" X " if i == j else "NV18" for j in range(8)) + "\tNODE\tSYS\t0-63,128-191\t0\n"
    for i in range(8)
)
NVSWITCH += (
    "NIC0\tNODE\tNODE\tPIX\tNODE\tSYS\tSYS\tSYS\tSYS\t X \tNODE\n\nLegend:\n\n  X    = Self\n  NV#  = a"
    " bonded set of # NVLinks\n"
)
# Written by hand after the same form: two pairs on NVLink, PCIe and the CPUs' link between them.
MIXED = """\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity
GPU0\t X \tNV4\tSYS\tSYS\t0-15
GPU1\tNV4\t X \tSYS\tSYS\t0-15
GPU2\tSYS\tSYS\t X \tNV4\t16-31
GPU3\tSYS\tSYS\tNV4\t X \t16-31
"""


def config_of(*overrides: str):
    return load_config([], ["model.path=m", "data.train=d.jsonl", *overrides], RECIPES)


def call(*arguments: str, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "megasd.cli", "doctor", *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def assert_well_formed(findings: list[dict]) -> None:
    for finding in findings:
        assert (
            set(finding) == {"name", "status", "detail", "fix"}
            and finding["detail"]
            and "\n" not in finding["detail"]
        )
        assert finding["status"] in ("ok", "warn", "fail") and (finding["fix"] is None) == (
            finding["status"] == "ok"
        ), finding


def test_on_this_machine_with_planted_faults(tmp_path: Path):
    """One real run: a foreign apex and a PYTHONPATH before the environment, a taken port, a dead
    URL, FP8 requested, secrets around.
    """
    for name, version in (
        ("apex", "0.9.10dev0"),
        ("leptonai", "0.47.1"),
        ("antlr4-python3-runtime", "4.9.3"),
    ):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        summary = (
            "Pyramid toolkit to add Velruse, Flash Messages, CSRF, ReCaptcha and Sessions"
            if name == "apex"
            else name
        )
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n"
        )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        overrides = [
            "model.path=m",
            "data.train=d.jsonl",
            f"run.dir={tmp_path}/run",
            "actor.fp8=hybrid",
            f"rollout.engine.port={port}",
        ]
        clock = Clock()
        status, out, err = call(
            *overrides,
            "--json",
            PYTHONPATH=str(tmp_path),
            HF_TOKEN="hf_very_secret",
            NCCL_DEBUG="hf_very_secret",
        )
        # at most 15 and Python's own start
        in_time = clock.within(30)
    assert status == 1 and err == "" and "Traceback" not in out and "hf_very_secret" not in out
    parsed = json.loads(out)
    assert set(parsed) == {"checks"}
    assert_well_formed(parsed["checks"])
    found = {finding["name"]: finding for finding in parsed["checks"]}
    failed = {name for name, finding in found.items() if finding["status"] == "fail"}
    assert {"config", "apex", "package leptonai", "package antlr4-python3-runtime", "engine port"} <= failed
    assert "4.9.3 and 4.13.2" in found["package antlr4-python3-runtime"]["detail"]
    assert "Pyramid" in found["apex"]["detail"] and "github.com/NVIDIA/apex" in found["apex"]["fix"]
    if not nvidia_smi.smi_says()[0]:
        assert {"gpu", "fp8"} <= failed and "actor.fp8" in found["gpu"]["detail"]
    assert not any("check itself failed" in finding["detail"] for finding in parsed["checks"])
    assert in_time


def test_without_a_config_a_machine_without_a_gpu_passes():
    findings = run_checks(
        {"gpu": gpus.check_gpus, "links": gpus.check_links, "fp8": gpus.check_fp8, "nccl": gpus.check_nccl},
        Machine(),
    )
    if nvidia_smi.smi_says()[0]:
        pytest.skip("this machine has a GPU")
    assert [(finding.name, finding.status) for finding in findings] == [
        ("gpu", "warn"), ("links", "ok"), ("fabric", "ok"), ("fp8", "ok"), ("nccl", "ok"),
    ]  # fmt: skip


def test_every_check_here_is_well_formed_and_none_breaks():
    # those of the real run above
    slow = ("torch", "sandbox", "packages")
    findings = run_checks(
        checks(slow), Machine(config=config_of("rollout.engine.urls=[http://u:pw@127.0.0.1:9]"))
    )
    assert_well_formed([vars(finding) for finding in findings])
    assert not [finding for finding in findings if "check itself failed" in finding.detail]
    engine = next(finding for finding in findings if finding.name.startswith("engine "))
    assert engine.status == "fail" and "refused" in engine.detail and "u:pw" not in str(engine)
    text = doctor.lines(findings)
    assert len(text) == len(findings) + 1 and all(
        "fix:" in line for line in text if line.startswith(("warn", "fail"))
    )


def test_a_config_that_cannot_be_read_is_a_finding(tmp_path: Path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: [")
    for items in (["none.yaml"], [str(bad)], ["optimizer.lrr=1"], ["model.path=m", "data.train=d"]):
        config, _, (finding,) = doctor.check_config(items)
        assert (
            finding.status == "fail"
            and "--dry-run" in finding.fix
            and (config is None) == (items[0] != "model.path=m")
        )


def test_on_a_bare_python_it_says_what_is_missing(tmp_path: Path):
    """An interpreter without any package, the checkout alone on its path."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from megasd.cli import main; sys.exit(main(['doctor',"
        " 'optimizer.lr=1', '--json']))"
    )
    python = [os.path.realpath(sys.executable), "-I", "-S", "-c", code]
    done = subprocess.run([*python, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1 and done.stderr == ""
    assert_well_formed(list(found.values()))
    for name in ("config", "packages", "torch"):
        assert found[name]["status"] == "fail" and "No module named" in found[name]["detail"], found[name]
    assert found["cpu"]["detail"] and found["memory"]["status"] in ("ok", "warn")


def test_a_broken_check_and_a_hanging_one_leave_the_others():
    def broken(machine: Machine) -> CheckResult:
        raise RuntimeError("two\nlines of sk-123456")

    found = run_checks(
        {
            "broken": broken,
            "slow": lambda machine: time.sleep(30),
            "good": lambda machine: CheckResult("good", "ok", "x"),
        },
        Machine(environment={"API_KEY": "sk-123456"}),
        seconds=2.0,
    )
    assert [(finding.name, finding.status) for finding in found] == [
        ("broken", "fail"),
        ("slow", "warn"),
        ("good", "ok"),
    ]
    assert "RuntimeError: two lines of ***" in found[0].detail and "report" in found[0].fix
    with pytest.raises(ValueError, match="fix"):
        CheckResult("x", "warn", "no fix")


def test_secrets_are_left_out():
    assert (
        redact("http://me:pw@host:1/x abcdef", {"MY_TOKEN": "abcdef", "HOME": "host:1"})
        == "http://host:1/x ***"
    )


# ---- packages ------------------------------------------------------------------------------------


def plant(folder: Path, name: str, version: str, requires: str = "") -> None:
    path = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    path.mkdir(parents=True)
    requirement = f"Requires-Dist: {requires}\n" if requires else ""
    (path / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requirement}")


def test_versions_against_the_pins_of_pyproject(tmp_path: Path):
    required, optional, _ = packages.declared()
    assert "torch" in required and "transformer-engine" in optional and "pytest" not in optional | required
    for name, requirement in required.items():
        version = next((s.version for s in requirement.specifier if s.operator in ("==", ">=")), "1")
        plant(tmp_path, name, f"{version}+cpu" if name == "torch" else version)
    plant(tmp_path, "transformer-engine", "2.16.1")
    plant(tmp_path, "lm-eval", "0.4.13", "transformers<5")
    machine = Machine(packages=[str(tmp_path)])
    found = {finding.name: finding for finding in packages.check_packages(machine)}
    bad = {name for name, finding in found.items() if finding.status != "ok"} - {"package megasd"}
    assert bad == {"package transformer-engine", "conflict lm-eval"}
    assert (
        "<2.12" in found["package transformer-engine"].detail
        and "megatron-core" in found["package transformer-engine"].detail
    )
    conflict = found["conflict lm-eval"]
    assert conflict.status == "warn" and "lm-eval 0.4.13 asks for transformers<5" in conflict.detail
    (tmp_path / "psutil-7.2.2.dist-info/METADATA").unlink()
    missing = {finding.name: finding for finding in packages.check_packages(machine)}["package psutil"]
    assert missing.status == "fail" and "pip install 'psutil==7.2.2'" in missing.fix


def test_apex_of_nvidia_passes_only_with_its_extensions():
    finding = packages.judge_apex(
        packages.Installed("apex", "0.1", "PyTorch Extensions written by NVIDIA", ())
    )
    assert finding.name == "apex" and finding.status == "warn" and "amp_C" in finding.detail


def test_a_pythonpath_that_hides_packages(tmp_path: Path):
    (tmp_path / "torch").mkdir()
    (finding,) = packages.conflicts([], {}, {"PYTHONPATH": str(tmp_path)})
    assert "hides" in finding.detail and finding.fix == "unset PYTHONPATH"


# ---- GPUs ----------------------------------------------------------------------------------------


def test_what_nvidia_smi_says():
    cards = tuple(nvidia_smi.parse_gpus(H200))
    assert len(cards) == 8 and cards[7] == nvidia_smi.InstalledGpu(
        7, "NVIDIA H200", 143771 << 20, 0, "570.211.01", (9, 0)
    )
    # memory shared with the host
    assert nvidia_smi.parse_gpus("0, NVIDIA GB10, [N/A], [N/A], 580.95, 12.1\n")[0].total == 0
    with pytest.raises(ValueError, match="nvidia-smi said"):
        nvidia_smi.parse_gpus("Failed to initialize NVML: Driver/library version mismatch")
    assert gpus.judge_gpus(cards, "", None).status == "ok"
    assert "8 x NVIDIA H200, 140.4 GiB each, driver 570.211.01" in gpus.judge_gpus(cards, "", None).detail
    busy = (replace(cards[0], used=100 << 30), *cards[1:])
    assert "GPU 0 100.0 GiB" in gpus.judge_gpus(busy, "", None).detail
    assert "differ" in gpus.judge_gpus((replace(cards[0], name="NVIDIA H100"), *cards[1:]), "", None).detail
    too_many = gpus.judge_gpus(cards[:2], "", config_of("actor.tensor_model_parallel_size=4"))
    assert too_many.status == "fail" and "take 4" in too_many.detail
    assert gpus.judge_gpus((), "no driver", None).status == "fail"
    assert gpus.judge_gpus((), "", None).status == "warn"
    assert gpus.judge_gpus((), "", config_of("actor.fp8=hybrid")).status == "fail"


def test_health():
    wrong = nvidia_smi.parse_health(
        "0, 0, Not Active, Not Active\n1, 3, Active, Active\n2, [N/A], Not Active, Not Active\n"
    )
    assert (
        len(wrong) == 3 and gpus.judge_health(wrong).status == "fail" and gpus.judge_health([]).status == "ok"
    )
    assert gpus.judge_health(nvidia_smi.parse_health("0, 0, Active, Not Active")).status == "warn"


def test_links():
    assert nvidia_smi.parse_topology(NVSWITCH) == Counter({"NV18": 28})
    assert gpus.judge_links(8, nvidia_smi.parse_topology(NVSWITCH)).status == "ok"
    mixed = gpus.judge_links(4, nvidia_smi.parse_topology(MIXED))
    assert mixed.status == "warn" and "4 of 6 pairs" in mixed.detail and "SYS 4, NV4 2" in mixed.detail
    assert gpus.judge_links(1, Counter()).status == "ok" and gpus.judge_links(2, Counter()).status == "warn"


def test_fabric(tmp_path: Path):
    port = tmp_path / "class/infiniband/mlx5_0/ports/1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert (
        gpus.judge_fabric(gpus._fabric(tmp_path), 2).detail
        == "1 of 1 InfiniBand ports active (1 x 400 Gb/sec (4X NDR))"
    )
    (port / "state").write_text("1: DOWN\n")
    assert gpus.judge_fabric(gpus._fabric(tmp_path), 1).status == "warn"
    assert gpus.judge_fabric([], 2).status == "warn" and gpus.judge_fabric([], 1).status == "ok"


def test_fp8_torch_and_nccl():
    cards = tuple(nvidia_smi.parse_gpus(H200))
    old = tuple(nvidia_smi.parse_gpus("0, NVIDIA A100-SXM4-80GB, 81920, 0, 570.1, 8.0"))
    assert gpus.judge_fp8(cards, "2.11.0", "", True).status == "ok"
    assert (
        gpus.judge_fp8(old, "2.11.0", "", False).status == "warn"
        and gpus.judge_fp8(old, "2.11.0", "", True).status == "fail"
    )
    assert "not installed" in gpus.judge_fp8(cards, None, "", True).detail
    assert "undefined symbol" in gpus.judge_fp8(cards, "2.11.0", "undefined symbol: _ZN3c10", True).detail
    seen = {"version": "2.13.0", "cuda": "13.0", "there": True, "count": 8}
    assert gpus.judge_torch(seen, cards).status == "ok"
    assert "CPU build" in gpus.judge_torch(seen | {"cuda": None, "there": False, "count": 0}, cards).detail
    assert "too old" in gpus.judge_torch(seen | {"there": False, "count": 0}, cards).fix
    assert gpus.judge_torch(seen | {"count": 2}, cards, "0,1").status == "ok"
    assert gpus.judge_torch({"error": "libcudart.so.13: cannot open"}, ()).status == "fail"
    assert gpus.judge_nccl([2, 29, 7], 8, {}).detail == "2.29.7"
    slow = gpus.judge_nccl([2, 29, 7], 8, {"NCCL_IB_DISABLE": "1", "NCCL_SHM_DISABLE": "0"})
    assert slow.status == "warn" and "InfiniBand switched off" in slow.detail
    assert gpus.judge_nccl(None, 8, {}).status == "fail"


# ---- the host ------------------------------------------------------------------------------------


def test_shared_memory_and_what_was_left_there(tmp_path: Path):
    # docker's default
    assert host.judge_shared_memory(64 << 20, 64 << 20, None).status == "fail"
    assert "--shm-size" in host.judge_shared_memory(64 << 20, 64 << 20, None).fix
    assert host.judge_shared_memory(16 << 30, 1 << 20, None).status == "warn"
    colocated = config_of("sync.transport=colocated", "sync.bucket_mib=2048")
    assert host.judge_shared_memory(16 << 30, 4 << 30, colocated).status == "warn"
    assert host.judge_shared_memory(16 << 30, 16 << 30, colocated).status == "ok"
    assert host.check_shared_memory(Machine(shm=tmp_path / "none"))[0].status == "fail"
    (tmp_path / "sglang_loads_x_1.shm").write_bytes(b"x" * 1000)
    (tmp_path / "other").write_bytes(b"x")
    for name, owner in (("megasd-0-dead", "999999999"), ("megasd-0-alive", str(os.getpid()))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "owner").write_text(owner)
    left = host.leftovers(Machine(shm=tmp_path))
    assert {path.name for path in left} == {"sglang_loads_x_1.shm", "megasd-0-dead"}
    assert (
        host.judge_leftovers(left, 10_000, tmp_path).status == "warn"
        and host.judge_leftovers(left, 1 << 30, tmp_path).status == "ok"
    )


def test_cgroups(tmp_path: Path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job_1\n")
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal:       64000000 kB\nMemAvailable:   60000000 kB\nHugePages_Total:       0\n"
    )
    inner = tmp_path / "sys/fs/cgroup/slurm/job_1"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    (inner / "memory.max").write_text(f"{2 << 30}\n")
    (inner / "memory.current").write_text("1000\n")
    machine = Machine(proc=tmp_path / "proc", sys=tmp_path / "sys")
    assert host.cgroup_cores(machine) == 1.5 and host.cgroup_memory(machine) == 2 << 30
    assert host.check_cpu(machine).status == "warn" and host.check_memory(machine).status == "warn"
    # v1
    (tmp_path / "proc/self/cgroup").write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    for controller, name, value in (
        ("cpu", "cpu.cfs_quota_us", "-1"),
        ("memory", "memory.limit_in_bytes", str(3 << 30)),
    ):
        (tmp_path / f"sys/fs/cgroup/{controller}/job").mkdir(parents=True)
        (tmp_path / f"sys/fs/cgroup/{controller}/job/{name}").write_text(value)
    assert host.cgroup_cores(machine) is None and host.cgroup_memory(machine) == 3 << 30


def test_limits_clock_and_ports():
    assert host.judge_limit("open files", 1024, 4096, "x").status == "warn"
    assert host.judge_limit("open files", resource.RLIM_INFINITY, 4096, "x").detail == "unlimited allowed"
    assert (
        host.judge_locked(8 << 20, True).status == "warn" and host.judge_locked(8 << 20, False).status == "ok"
    )
    assert (
        host.judge_clock(0.0, 0.1, 0, "now").status == "ok"
        and host.judge_clock(0.0, None, None, "now").status == "ok"
    )
    assert host.judge_clock(30.0, 0.0, 0, "now").status == "fail"
    assert "run.dir" in host.judge_clock(0.0, -60.0, 0, "now").detail
    assert host.judge_clock(0.0, 0.0, host.UNSYNCHRONISED, "now").status == "warn"
    assert abs(host.file_skew(ROOT)) < host.SKEW_SECONDS and host.file_skew(Path("/proc/self")) is None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "in use" in host.port_error("127.0.0.1", taken.getsockname()[1])
    assert host.port_error("127.0.0.1", 0) == ""


def test_disk(tmp_path: Path):
    config = config_of("actor.dtype=bfloat16", "checkpoint.keep=1", f"run.dir={tmp_path}/run")
    names = ["Qwen3-8B", "Qwen3-32B", "Llama-3.1-70B", "Qwen3-30B-A3B"]
    counts = [
        storage.parameters_of(json.loads((ROOT / f"configs/model/{name}.json").read_text())) / 1e9
        for name in names
    ]
    # as their model cards say
    assert counts == pytest.approx([8.19, 32.76, 70.55, 30.53], rel=0.002)
    parameters = 8_000_000_000
    each = storage.checkpoint_bytes(config, parameters)
    teacher = (
        4
        if config.algorithm.teacher and config.algorithm.teacher.weights in storage.TEACHERS_WITH_FP32_COPY
        else 0
    )
    assert each == parameters * (2 + 12 + teacher)
    needed = 2 * each + 2 * parameters
    assert storage.judge_space(needed - 1, "/x", True, config, parameters).status == "fail"
    assert storage.judge_space(needed + 1, "/x", True, config, parameters).status == "warn"
    assert storage.judge_space(2 * needed, "/x", True, config, parameters).status == "ok"
    assert storage.judge_space(2 * needed, "/x", False, config, parameters).status == "fail"
    assert storage.judge_space(1 << 30, "/x", True, None, None).status == "warn"
    unknown = replace(config, model=replace(config.model, path="/models/Qwen3-8B"))
    assert storage.count_parameters(unknown, [str(ROOT / "configs/cluster/x.yaml")]) == pytest.approx(
        8.19e9, rel=0.002
    )


def test_file_systems():
    mounts = (
        "overlay / overlay rw 0 0\n/dev/sda /data ext4 rw 0 0\nserver:/x /data/runs nfs4 rw 0 0\ntmpfs /tmp"
        " tmpfs rw 0 0\n"
    )
    kinds = [
        storage.file_system(mounts, Path(path))
        for path in ("/", "/data", "/data/runs", "/data/runsx", "/tmp/x")
    ]
    assert kinds == ["overlay", "ext4", "nfs4", "ext4", "tmpfs"]
    assert [storage.judge_file_system(kind, "/x", True).status for kind in kinds] == [
        "warn",
        "ok",
        "warn",
        "ok",
        "warn",
    ]
    assert storage.judge_file_system("overlay", "/x", False).status == "ok"


# ---- SGLang --------------------------------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    """Speaks enough HTTP for a check to judge: it gives the answers that a broken server would."""

    pages: dict[str, tuple[int, str]] = {}
    date: str | None = None
    requests: list[tuple[str, str | None]] = []

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers.get("Authorization")))
        status, text = self.pages.get(self.path, (404, ""))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def date_time_string(self, timestamp: float | None = None) -> str:
        return self.date or super().date_time_string(timestamp)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Answers,), {"pages": {}, "requests": []})
    web_server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=web_server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{web_server.server_port}"
    web_server.shutdown()
    web_server.server_close()


def test_engines(server):
    handler, url = server
    assert "404" in engines.check_url(url).detail
    handler.pages["/model_info"] = (200, "hello")
    assert "no JSON" in engines.check_url(url).detail
    handler.pages["/model_info"] = (200, "{}")
    assert "not that of an SGLang server" in engines.check_url(url).detail
    handler.pages["/model_info"] = (200, '{"weight_version": "7", "architectures": ["Qwen3ForCausalLM"]}')
    assert "generates nothing" in engines.check_url(url).detail
    handler.pages["/v1/loads"] = (200, '{"loads": [{"num_running_reqs": 1, "num_used_tokens": 5}]}')
    # it holds a request and does not move
    assert "generates nothing" in engines.check_url(url).detail
    handler.pages["/health_generate"] = (200, "")
    good = engines.check_url(url, key="k" * 16)
    assert (
        good.status == "ok"
        and "weight version 7" in good.detail
        and handler.requests[-1][1] == "Bearer " + "k" * 16
    )
    handler.date = "Mon, 01 Jan 2001 00:00:00 GMT"
    assert "its clock is" in engines.check_url(url).detail
    handler.pages["/model_info"] = (401, "")
    assert "MEGASD_ENGINE_KEY" in engines.check_url(url).detail


def test_sglang():
    says = {
        "sglang": "0.5.23",
        "torch": "2.13.0",
        "saver": None,
        "requires": ["torch==2.14.1"],
        "found": True,
        "megasd": True,
    }
    assert engines.judge_sglang(says, "python", False, None).status == "ok"
    shared = engines.judge_sglang(says, "python", True, None)
    assert (
        shared.status == "warn" and "torch==2.14.1" in shared.detail and engines.ENGINE_PYTHON in shared.fix
    )
    apart = says | {"torch": "2.14.1"}
    assert engines.judge_sglang(apart, "python", True, None).status == "ok"
    assert (
        engines.judge_sglang(apart, "python", True, config_of("rollout.engine.release_memory=true")).status
        == "fail"
    )
    assert engines.judge_sglang(apart | {"megasd": False}, "python", True, None, key=True).status == "fail"
    assert engines.judge_sglang(says | {"sglang": "0.5.18"}, "python", False, None).status == "warn"
    gone = says | {"sglang": None}
    assert engines.judge_sglang(gone, "python", False, None).status == "warn"
    assert engines.judge_sglang(gone, "python", True, config_of()).status == "fail"
    assert engines.judge_sglang(gone, "python", True, config_of("rollout.engine.served=2")).status == "ok"
    wrong = engines.check_sglang(Machine(environment={engines.ENGINE_PYTHON: "/no/python"}))
    assert wrong.status == "fail" and re.search("MEGASD_ENGINE_PYTHON", wrong.fix)


def test_the_names_are_those_of_rollout():
    """doctor imports nothing of rollout, which needs packages that may be missing; a started engine
    takes the python that is named.
    """
    from megasd.engine import auth as engine_key
    from megasd.engine import process as server

    assert (engines.ENGINE_PYTHON, engines.KEY) == (server.ENGINE_PYTHON, engine_key.VARIABLE)
    assert f'"sglang=={engines.SGLANG}"' in (ROOT / "pyproject.toml").read_text()


def test_proxies_are_named_and_not_shown():
    machine = Machine(
        environment={"http_proxy": "http://me:password@proxy:3128"},
        config=config_of("rollout.engine.urls=[http://node7:1]"),
    )
    finding = engines.check_proxy(machine)
    assert finding.status == "warn" and "node7" in finding.detail and "password" not in str(finding)
    spared = {"http_proxy": "x", "NO_PROXY": "127.0.0.1, node7"}
    assert engines.check_proxy(replace(machine, environment=spared)).status == "ok"


def test_fp8_by_blocks_needs_hopper_and_cuda_12_9() -> None:
    """TransformerEngine's own condition for its recipe Float8BlockScaling."""
    hopper, ada = (
        nvidia_smi.InstalledGpu(0, "GPU", 80 << 30, 0, "570.1", capability) for capability in ((9, 0), (8, 9))
    )
    for card, recipe, cuda, status in (
        (hopper, "blockwise", "12.9", "ok"),
        (hopper, "blockwise", "13.0", "ok"),
        (hopper, "blockwise", "12.8", "fail"),
        (hopper, "blockwise", None, "fail"),
        (ada, "blockwise", "12.9", "fail"),
        (ada, "tensorwise", None, "ok"),
    ):
        found = gpus.judge_fp8((card,), "2.11.0", "", True, recipe, cuda)
        assert found.status == status, (card, recipe, cuda, found)
    assert (
        "set actor.fp8_recipe=tensorwise"
        in gpus.judge_fp8((ada,), "2.11.0", "", True, "blockwise", "12.9").fix
    )
