"""Checks of SGLang: the package that engines start from, and the servers that the config names."""

from __future__ import annotations

import base64
import email.utils
import json
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megasd.cluster.doctor.host import SKEW_SECONDS
from megasd.cluster.doctor.nvidia_smi import smi_says
from megasd.cluster.doctor.report import CheckResult, Machine, command, fail, ok, one_line, warn
from megasd.config.schema import Config
from megasd.config.validate_rollout import needs_engine

# The version whose HTTP interface megasd/engine uses.
SGLANG = "0.5.23"
# Names of engine/auth.py and engine/process.py. They are repeated here because the doctor must work
# where packages that those files import are missing.
KEY = "MEGASD_ENGINE_KEY"
ENGINE_PYTHON = "MEGASD_ENGINE_PYTHON"
ASK_SGLANG = """
import importlib.metadata as m, importlib.util as u, json
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
requires = [text for text in m.requires("sglang") or []] if version("sglang") else []
print(json.dumps({
    "sglang": version("sglang"),
    "torch": version("torch"),
    "saver": version("torch_memory_saver"),
    "requires": requires,
    "found": u.find_spec("sglang") is not None,
    "megasd": u.find_spec("megasd") is not None,
}))
"""
# Numbers of /v1/loads that change while an engine works.
PROGRESS = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")


def check_sglang(machine: Machine) -> CheckResult:
    """Check the version of SGLang in the environment that engines start from.

    SGLang itself is not imported: that takes seconds, and without a GPU it fails.
    """
    python = machine.environment.get(ENGINE_PYTHON) or sys.executable
    status, text = command([python, "-c", ASK_SGLANG])
    if status:
        said = one_line(text.splitlines()[-1] if text else f"exit status {status}")
        return fail(
            "sglang",
            f"{python} does not answer: {said}",
            f"let {ENGINE_PYTHON} name the python of SGLang's environment",
        )
    key = bool(machine.environment.get(KEY))
    return judge_sglang(
        json.loads(text.splitlines()[-1]), python, bool(smi_says()[0]), machine.config, key=key
    )


def judge_sglang(
    says: dict[str, Any], python: str, gpu: bool, config: Config | None, *, key: bool = False
) -> CheckResult:
    """Judge what ASK_SGLANG prints; gpu: there are GPUs; key: MEGASD_ENGINE_KEY is set."""
    elsewhere = config is not None and (
        not needs_engine(config) or bool(config.rollout.engine.urls) or config.rollout.engine.served > 0
    )
    install = f"make a second environment: python -m venv engine && engine/bin/pip install 'sglang=={SGLANG}'"
    apart = f"{install}, and export {ENGINE_PYTHON}=$PWD/engine/bin/python"
    if says["sglang"] is None or not says["found"]:
        if elsewhere:
            return ok("sglang", "not installed, and this run starts no engine here")
        bad = fail if config else warn
        return bad(
            "sglang",
            f"not installed for {python}",
            apart if gpu else "make install (it puts the wheel in without CUDA's)",
        )
    detail = f"{says['sglang']} for {python}"
    if says["sglang"] != SGLANG:
        return warn("sglang", f"{detail}; megasd speaks to {SGLANG}", f"pip install 'sglang=={SGLANG}' there")
    wanted = _other_torch(says)
    if gpu and wanted is not None:
        detail += f"; it asks for torch{wanted.specifier}, and torch {says['torch']} is there"
        return warn("sglang", detail, apart)
    if key and not says["megasd"]:
        fix = f"pip install --no-deps megasd there, or unset {KEY}"
        return fail(
            "sglang", f"{detail}; {KEY} is set, and only megasd's own start of the server reads it", fix
        )
    if gpu and config and config.rollout.engine.release_memory and says["saver"] is None:
        return fail(
            "sglang",
            f"{detail}; rollout.engine.release_memory needs torch_memory_saver",
            "pip install torch_memory_saver there",
        )
    if wanted is not None:
        detail += f" (asks for torch{wanted.specifier}, which its CPU path does without)"
    return ok("sglang", detail)


def _other_torch(says: dict[str, Any]) -> Requirement | None:
    """SGLang's requirement of torch if the installed torch does not satisfy it, else None."""
    for requirement in map(Requirement, says["requires"]):
        if canonicalize_name(requirement.name) == "torch" and requirement.marker is None:
            installed = says["torch"]
            fits = installed is None or requirement.specifier.contains(installed, prereleases=True)
            return None if fits else requirement
    return None


def check_urls(machine: Machine) -> list[CheckResult]:
    """Check every server of rollout.engine.urls, and the router."""
    engine = machine.config.rollout.engine if machine.config else None
    if engine is None or not (engine.urls or engine.router):
        return [ok("engines", "no rollout.engine.urls to ask")]
    key = machine.environment.get(KEY)
    found = [check_url(url, machine.config, key) for url in engine.urls]
    return found + ([_check_router(engine.router, key)] if engine.router else [])


def check_url(
    url: str, config: Config | None = None, key: str | None = None, seconds: float = 3.0
) -> CheckResult:
    """Check one server: its model and version, that it works, and its clock.

    A server works if it generates, or if it makes progress on the requests that it has.
    """
    name, shown = f"engine {_safe(url)}", _safe(url)
    start = (
        "start it (megasd serve, or sglang.launch_server), or correct rollout.engine.urls; from here: curl"
        f" {shown}/model_info"
    )
    try:
        info, date = _get(f"{url.rstrip('/')}/model_info", key, seconds)
    except OSError as error:
        return fail(name, f"does not answer: {_reason(error)}", start)
    except ValueError:
        return fail(
            name, "answers /model_info with something that is no JSON", f"is it an SGLang server? {start}"
        )
    if not isinstance(info, dict) or "weight_version" not in info:
        return fail(
            name,
            "its /model_info is not that of an SGLang server",
            f"give the server's URL, or serve with SGLang {SGLANG}",
        )
    wanted = _architectures(config)
    if wanted and info.get("architectures") and info["architectures"] != wanted:
        fix = "serve model.path there, or give that server's model as model.path"
        return fail(name, f"serves {info['architectures']}, model.path is {wanted}", fix)
    if not (_generates(url, key, seconds) or _moves(url, key, seconds)):
        return fail(
            name, "answers, but generates nothing (/health_generate)", "look at its log, and start it again"
        )
    detail = f"generates, weight version {info['weight_version']}"
    skew = date - time.time() if date else 0.0
    if abs(skew) > SKEW_SECONDS:
        return warn(
            name,
            f"{detail}; its clock is {skew:+.0f} s off ours",
            "enable chronyd or systemd-timesyncd on both machines",
        )
    return ok(name, detail)


def _check_router(url: str, key: str | None) -> CheckResult:
    name = f"router {_safe(url)}"
    try:
        _get(f"{url.rstrip('/')}/health", key, 3.0)
    except OSError as error:
        return fail(
            name,
            f"does not answer: {_reason(error)}",
            "start sglang-router, or set rollout.engine.router=null",
        )
    except ValueError:
        # The answer is empty, but the router is there.
        pass
    return ok(name, "answers")


def _generates(url: str, key: str | None, seconds: float) -> bool:
    try:
        _get(f"{url.rstrip('/')}/health_generate", key, seconds)
    except OSError:
        return False
    except ValueError:
        # The answer of a healthy server is empty.
        pass
    return True


def _moves(url: str, key: str | None, seconds: float) -> bool:
    """Whether the scheduler's numbers of requests and tokens change.

    A busy engine may keep /health_generate waiting and still work.
    """
    before = None
    for _ in range(3):
        try:
            answer, _date = _get(f"{url.rstrip('/')}/v1/loads", key, seconds)
            now = [[load.get(name) for name in PROGRESS] for load in answer["loads"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if before is not None and now != before:
            return True
        before = now
        time.sleep(0.4)
    return False


def _get(url: str, key: str | None, seconds: float) -> tuple[Any, float | None]:
    """Return (JSON of the answer, the server's time in seconds since 1970, or None).

    OSError if there is no answer with a good status, ValueError if the answer is not JSON.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    user = re.match(r"https?://([^/@]+)@", url)
    if user:
        headers = {"Authorization": f"Basic {base64.b64encode(user[1].encode()).decode()}"}
    request = urllib.request.Request(_safe(url), headers=headers)
    # Like a run, talk to engines directly and not through a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=seconds) as answer:
        date = answer.headers.get("Date")
        return json.loads(answer.read(1 << 20)), (
            email.utils.parsedate_to_datetime(date).timestamp() if date else None
        )


def _reason(error: OSError) -> str:
    if isinstance(error, urllib.error.HTTPError):
        said = {401: f"; set {KEY}", 403: f"; set {KEY}"}.get(error.code, "")
        return f"HTTP status {error.code}{said}"
    return one_line(str(getattr(error, "reason", None) or error))


def _safe(url: str) -> str:
    """The URL without a user and password, which some put before the host."""
    return re.sub(r"//[^/@]*@", "//", url)


def _architectures(config: Config | None) -> list[str] | None:
    path = Path(config.model.path) / "config.json" if config else None
    if path is None or not path.is_file():
        return None
    return json.loads(path.read_text()).get("architectures")


def check_proxy(machine: Machine) -> CheckResult:
    """Check for a proxy that would catch requests to engines.

    Values of the variables are not shown, since they may hold passwords.
    """
    names = [
        name
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
        if machine.environment.get(name)
    ]
    if not names:
        return ok("proxy", "none set")
    spared = machine.environment.get("no_proxy") or machine.environment.get("NO_PROXY") or ""
    urls = machine.config.rollout.engine.urls if machine.config else []
    hosts = {"127.0.0.1"} | {urlsplit(url).hostname or "" for url in urls}
    missed = sorted(host for host in hosts if host not in re.split(r"[\s,]+", spared))
    if missed and spared != "*":
        fix = f"export NO_PROXY=$NO_PROXY,{','.join(missed)} no_proxy=$NO_PROXY"
        return warn("proxy", f"{', '.join(names)} set, and NO_PROXY does not name {', '.join(missed)}", fix)
    return ok("proxy", f"{', '.join(names)} set, NO_PROXY names the engines")
