"""The flow `rollout`: have all servers taken up the champion, and do they answer as it should?

Servers follow their alias by themselves (`flows.following`); this flow only watches. It waits until each one
shows the champion's digest, sends the golden requests of the registered folder over HTTP (images, or prompts
of a language model), and publishes a table. A server that does not get there fails the flow, with its reason;
`rollout.rollback_on_failure` then moves the alias back, and the servers follow it back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
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
from flows.golden_texts import GoldenText, ask_texts, read_texts  # noqa: E402
from flows.language_registration import is_language_model  # noqa: E402
from flows.language_registry import fetch_version  # noqa: E402
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


@dataclass(frozen=True)
class ExpectedTexts:
    """The same of a language model."""

    version: Version
    digest: str
    golden: Sequence[GoldenText]
    headers: Mapping[str, str] = field(default_factory=dict)  # the key that servers ask for


@flow(name="rollout", persist_result=False)
def rollout(model: str = "", servers: list[str] | None = None) -> dict[str, Any]:
    """Watch the servers take up the champion; see the module.

    Args:
        model: registered model; empty: the one that `objective` of params.yaml is about.
        servers: URLs; None: `rollout.servers`, or `rollout.language_servers`.

    Raises:
        ConfigError: there is no server to ask.
        DataError: no such model, no champion, or its files are damaged.
        GateFailed: a server does not serve the champion.
    """
    params = parameters.load()
    found = find_servers(params, model, servers)
    name, urls = found.version.name, found.urls
    expected = expectation(params, found.version)
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


@dataclass(frozen=True)
class Servers:
    """A champion and who should serve it."""

    version: Version
    urls: list[str]


def find_servers(params: Params, model: str, given: Sequence[str] | None) -> Servers:
    """
    Raises:
        ConfigError: there is no server to ask.
        DataError: no such model, or no champion.
    """
    version = serve.find(params, model or serve.default_model(params), CHAMPION, "")
    key = "language_servers" if is_language_model(version) else "servers"
    if urls := list(getattr(params.rollout, key) if given is None else given):
        return Servers(version, urls)
    raise ConfigError(f"no servers to ask: list their URLs in rollout.{key} or give --server URL")


def expectation(params: Params, version: Version) -> Expected | ExpectedTexts:
    """What servers of `version` show and answer; its files are fetched and verified.

    Raises:
        DataError: its files are damaged.
    """
    digest = version.tags.get("onnx.digest")
    if not digest:
        raise DataError(f"{version.name} version {version.version} has no tag onnx.digest; register it again")
    if is_language_model(version):
        texts = read_texts(fetch_version(params, version).folder)
        return ExpectedTexts(version, digest, texts, authorization(params.lamina.http.api_key_file))
    golden = read_golden(serve.release(params, version).folder)
    return Expected(
        version, digest, golden, params.serve.golden_tolerance, params.serve.golden_int8_agreement
    )


@task(cache_policy=NO_CACHE, persist_result=False, name="check servers")
def check_servers(
    settings: Rollout, expected: Expected | ExpectedTexts, urls: list[str]
) -> list[ServerCheck]:
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


def check_server(
    settings: Rollout, expected: Expected | ExpectedTexts, url: str, until: float
) -> ServerCheck:
    """Wait for one server, then ask it; `until` is a time.monotonic()."""
    started = time.monotonic()
    headers = expected.headers if isinstance(expected, ExpectedTexts) else {}
    with httpx.Client(base_url=url.rstrip("/"), timeout=settings.request_s, headers=headers) as client:
        while True:
            version, reason, is_final = look(client, expected)
            if not reason or is_final or time.monotonic() >= until:
                break
            time.sleep(min(settings.poll_s, max(0.0, until - time.monotonic())))
        seconds = round(time.monotonic() - started, 1)
        if not reason:
            reason = ask(client, expected)
        elif not is_final:
            reason += f", {seconds:g} s after it was asked first"
    passed = not reason
    asked = f"{len(expected.golden)} golden requests answered" if expected.golden else "no golden requests"
    return ServerCheck(url, passed, version, seconds, reason or f"serves the champion, {asked}")


def look(client: httpx.Client, expected: Expected | ExpectedTexts) -> tuple[str, str, bool]:
    """The version it shows, why that is not the champion (empty: it is), and whether waiting is in vain."""
    part = "bundle" if isinstance(expected, ExpectedTexts) else "fp32"
    try:
        answer = client.get("/healthz")
        health = answer.json()
        version, digest = str(health["version"]), health["digests"][part]
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


def ask(client: httpx.Client, expected: Expected | ExpectedTexts) -> str:
    """Send the golden requests, images or prompts; the first problem, or empty."""
    if isinstance(expected, Expected):
        return ask_golden(client, expected)
    if problem := ask_texts(client, expected.version.name, expected.golden):
        return problem
    return look(client, expected)[1]  # answers do not name their version: it must still be this one


def authorization(key_file: str) -> dict[str, str]:
    """
    Raises:
        ConfigError: the file is of no use.
    """
    if not key_file:
        return {}
    try:
        return {"Authorization": f"Bearer {Path(key_file).read_text(encoding='utf-8').strip()}"}
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"lamina.http.api_key_file {key_file!r} cannot be read: {error}") from None


def ask_golden(client: httpx.Client, expected: Expected) -> str:
    """Send the golden images; the first problem, or empty."""
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
