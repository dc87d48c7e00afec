"""The flow `rollout`: have all servers taken up the champion, and do they answer as it should?

Servers follow their alias by themselves (`flows.following`); this flow only watches. It waits until each one
shows the champion's digest, sends the golden requests of the registered folder over HTTP, and publishes a
table. A server that does not get there fails the flow, with its reason; `rollout.rollback_on_failure` then
moves the alias back, and the servers follow it back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from flows import environment

environment.prepare()

import httpx  # noqa: E402
from prefect import flow, get_run_logger, task  # noqa: E402  # Prefect reads its settings at import
from prefect.artifacts import create_table_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402

from flows import aliases, serve  # noqa: E402
from flows import params as parameters  # noqa: E402
from flows.errors import ConfigError, DataError, GateFailed  # noqa: E402
from flows.language_registration import is_language_model  # noqa: E402
from flows.params import Params, Rollout  # noqa: E402
from flows.registry import CHAMPION, Version  # noqa: E402
from flows.serving.golden import Golden, compare, read_golden  # noqa: E402

environment.hide_traces_of_mistakes()


@dataclass(frozen=True)
class ServerCheck:
    """One row of the table."""

    server: str
    passed: bool
    version: str  # that it shows; empty when it cannot be asked
    seconds: float  # until it showed the champion
    reason: str


@dataclass(frozen=True)
class Expected:
    """What every server has to show and to answer."""

    version: Version
    digest: str
    golden: Sequence[Golden]
    tolerance: float
    int8_agreement: float


@flow(name="rollout", persist_result=False)
def rollout(model: str = "", servers: list[str] | None = None) -> dict[str, Any]:
    """Watch the servers take up the champion; see the module.

    Args:
        model: registered model; empty: the one of params.yaml's data set.
        servers: URLs; None: `rollout.servers`.

    Raises:
        ConfigError: there is no server to ask.
        DataError: no such model, no champion, or its files are damaged.
        GateFailed: a server does not serve the champion.
    """
    params = parameters.load()
    urls = chosen_servers(params, servers)
    name = model or params.registered_model(serve.dataset_name(params))
    expected = expectation(params, name)
    get_run_logger().info(
        "%s version %s (digest %s) on %d servers, %d golden requests each",
        name, expected.version.version, expected.digest[:12], len(urls), len(expected.golden),
    )  # fmt: skip
    checks = check_servers(params.rollout, expected, urls)
    failed = [check for check in checks if not check.passed]
    if failed:
        message = "; ".join(f"{check.server}: {check.reason}" for check in failed)
        if params.rollout.rollback_on_failure:
            message += f"; {roll_back(params, name)}"
        raise GateFailed(f"rollout of {name} version {expected.version.version}: {message}")
    return {
        "model": name,
        "version": expected.version.version,
        "servers": [asdict(check) for check in checks],
    }


def chosen_servers(params: Params, given: Sequence[str] | None) -> list[str]:
    """
    Raises:
        ConfigError: there is none.
    """
    if urls := list(params.rollout.servers if given is None else given):
        return urls
    raise ConfigError("no servers to ask: list their URLs in rollout.servers or give --server URL")


def expectation(params: Params, name: str) -> Expected:
    """The champion of `name`, its files fetched and verified.

    Raises:
        DataError: no such model, no champion, or its files are damaged.
    """
    version = serve.find(params, name, CHAMPION, "")
    if is_language_model(version):
        raise DataError(
            f"{name} is a language model, and `trunkline rollout` asks servers of image classifiers; restart "
            "its servers with: trunkline serve language --model " + name
        )
    digest = version.tags.get("onnx.digest")
    if not digest:
        raise DataError(f"{name} version {version.version} has no tag onnx.digest; register it again")
    golden = read_golden(serve.release(params, version).folder)
    return Expected(
        version, digest, golden, params.serve.golden_tolerance, params.serve.golden_int8_agreement
    )


@task(cache_policy=NO_CACHE, persist_result=False, name="check servers")
def check_servers(settings: Rollout, expected: Expected, urls: list[str]) -> list[ServerCheck]:
    """Ask all servers at once."""
    until = time.monotonic() + settings.wait_s
    with ThreadPoolExecutor(len(urls)) as pool:
        checks = list(pool.map(lambda url: check_server(settings, expected, url, until), urls))
    for check in checks:
        get_run_logger().info("%s: %s", check.server, check.reason)
    create_table_artifact(
        [asdict(check) for check in checks],
        key="rollout",
        description=f"{expected.version.name} version {expected.version.version} on its servers",
    )
    return checks


def check_server(settings: Rollout, expected: Expected, url: str, until: float) -> ServerCheck:
    """Wait for one server, then ask it; `until` is a time.monotonic()."""
    started = time.monotonic()
    with httpx.Client(base_url=url.rstrip("/"), timeout=settings.request_s) as client:
        while True:
            version, reason, is_final = look(client, expected)
            if not reason or is_final or time.monotonic() >= until:
                break
            time.sleep(min(settings.poll_s, max(0.0, until - time.monotonic())))
        seconds = round(time.monotonic() - started, 1)
        if not reason:
            reason = ask_golden(client, expected)
        elif not is_final:
            reason += f", {seconds:g} s after it was asked first"
    passed = not reason
    asked = f"{len(expected.golden)} golden requests answered" if expected.golden else "no golden requests"
    return ServerCheck(url, passed, version, seconds, reason or f"serves the champion, {asked}")


def look(client: httpx.Client, expected: Expected) -> tuple[str, str, bool]:
    """The version it shows, why that is not the champion (empty: it is), and whether waiting is in vain."""
    try:
        answer = client.get("/healthz")
        health = answer.json()
        version, digest = str(health["version"]), health["digests"]["fp32"]
        following = health.get("rollout") or {}
    except httpx.HTTPError as error:
        return "", f"cannot be reached: {str(error) or type(error).__name__}", False
    except (ValueError, KeyError, TypeError):
        return "", f"/healthz answers {answer.status_code} with something else", False
    # the version too: the same network can be registered twice, and then other golden answers go with it
    is_champion = (digest, version) == (expected.digest, expected.version.version)
    if is_champion and health.get("status") == "ok":
        return version, "", False
    reason = f"serves version {version} (digest {str(digest)[:12]}), status {health.get('status')}"
    state = following.get("state")
    if state == "fixed":
        return version, f"{reason}; it was started on a fixed version and does not follow the alias", True
    if state == "failed" and following.get("candidate") == expected.version.version:
        return version, f"{reason}; it refused the new one: {following.get('reason')}", True
    if following.get("reason"):
        reason += f"; {following['reason']}"
    return version, reason, False


def ask_golden(client: httpx.Client, expected: Expected) -> str:
    """Send the golden requests; the first problem, or empty."""
    problems = []
    is_int8 = False
    for golden in expected.golden:
        try:
            answer = client.post("/v1/classify", content=golden.data)
            body = answer.json()
            if answer.status_code != 200:
                return f"golden request {golden.name}: status {answer.status_code}: {answer.text[:200]}"
            model, index, confidence = body["model"], int(body["index"]), float(body["confidence"])
            is_int8 = model["variant"] == "int8"
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            return f"golden request {golden.name}: {str(error) or type(error).__name__}"
        if model["version"] != expected.version.version:
            return f"golden request {golden.name} was answered by version {model['version']}"
        if problem := compare(golden, index, confidence, 1.0 if is_int8 else expected.tolerance):
            problems.append(problem)
    allowed = len(expected.golden) * (1 - expected.int8_agreement) if is_int8 else 0
    if len(problems) <= allowed:
        return ""
    return f"{len(problems)} of {len(expected.golden)} golden requests are wrong, first {problems[0]}"


def roll_back(params: Params, name: str) -> str:
    """Move the champion back; one sentence about what happened, also when it could not be done."""
    try:
        entry = aliases.rollback(params, name, "a server did not take the champion up")
    except Exception as error:  # the failed rollout is the news, not this
        return f"the alias could not be moved back: {error}"
    return f"champion is version {entry.to_version} again"
