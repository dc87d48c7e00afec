"""The command `trunkline`: run the pipeline, sweep over settings, serve a model, rewrite the report.

Heavy packages are imported inside the commands, so that `trunkline --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows import environment, params, paths
from flows import services as background
from flows.errors import ConfigError, GateFailed, Interrupted, TrunklineError, explain
from flows.study_commands import study_app

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
serve_app = typer.Typer(no_args_is_help=True, help="Serve a registered model.")
app.add_typer(serve_app, name="serve")
plan_app = typer.Typer(no_args_is_help=True, help="Say beforehand what something needs.")
app.add_typer(plan_app, name="plan")
app.add_typer(study_app, name="study")
import_app = typer.Typer(
    no_args_is_help=True, help="Turn published language models into Hugging Face folders."
)
app.add_typer(import_app, name="import")
export_app = typer.Typer(no_args_is_help=True, help="Turn models into what the servers open.")
app.add_typer(export_app, name="export")


@app.command()
def run(
    dataset: Annotated[
        str,
        typer.Option(
            help="digits, cifar10 or a folder of images; of texts if objective is causal_lm; empty: as in "
            "params.yaml"
        ),
    ] = "",
    recipe: Annotated[str, typer.Option(help="name in recipes/ or path of an overlay of params.yaml")] = "",
    set_: Annotated[list[str], typer.Option("--set", help="key=value, may be repeated")] = [],  # noqa: B006
    smoke: Annotated[
        bool, typer.Option("--smoke", help="a shrunken version, recipes/smoke.yaml; not promoted")
    ] = False,
) -> None:
    """Run the whole pipeline: DVC stages, registration, promotion, smoke test, report."""
    workspace_checks(dataset, recipe, set_, smoke)
    if smoke:
        print(
            f"SMOKE RUN of {f'recipe {recipe}' if recipe else 'params.yaml'}: sizes and steps are cut to "
            "those of recipes/smoke.yaml; its figures mean nothing and nothing is promoted",
            flush=True,
        )
    from flows.pipeline import pipeline
    from flows.summary import print_summary

    environment.interrupt_on_sigterm()
    try:
        summary = pipeline(dataset=dataset, recipe=recipe, settings=set_, smoke=smoke)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command continues where it was") from None
    print_summary(summary)


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(help="sweep file, or its name in recipes/sweeps/")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the points and what each would run")
    ] = False,
    parallel: Annotated[
        int, typer.Option(min=0, help="points at once; 0: sweep.parallel of params.yaml")
    ] = 0,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="also points that would fail in the same way again")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="a failed point makes the command fail")] = False,
) -> None:
    """Try many settings: every point of a sweep file through the same stages, several at once."""
    from flows.sweeps.planned import prepare
    from flows.sweeps.summary import print_plan, print_results, refuse_failures

    paths.workspace()
    planned = prepare(file, parallel)  # finds mistakes before a server is started for the flow
    if dry_run:
        print_plan(planned)
        return
    from flows import workspace

    workspace.require_writable()
    from flows.sweep import sweep as run_sweep

    environment.interrupt_on_sigterm()
    try:
        summary = run_sweep(file, parallel, retry_failed)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command continues where it was") from None
    print_results(summary)
    refuse_failures(summary, strict)


def workspace_checks(dataset: str, recipe: str, settings: list[str], smoke: bool = False) -> None:
    """Find a user's mistake before a server is started for the flow."""
    from flows import workspace

    place = workspace.prepare(dataset, recipe, settings, smoke)
    if place.params.objective == "causal_lm":
        text_checks(place.params, place.root)
        workspace.require_writable()
        return
    source = Path(place.params.ingest.source)
    if not (source if source.is_absolute() else place.root / source).exists():
        raise ConfigError(f"`ingest.source`: {source} does not exist")
    initial = place.params.pretrain.initialize_from
    if initial and not (place.root / initial).is_file():
        raise ConfigError(
            f"`pretrain.initialize_from`: {initial} does not exist (a relative path: in {place.root})"
        )
    workspace.require_writable()


def text_checks(checked: params.Params, root: Path) -> None:
    """The same for the language track, which needs packages that images do not."""
    from importlib.util import find_spec

    missing = [name for name in ("tokenizers", "transformers", "networkx") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"objective causal_lm needs {', '.join(missing)}; install it: pip install -e '.[language]'"
        )
    source = Path(checked.ingest_text.source)
    if not (source if source.is_absolute() else root / source).exists():
        raise ConfigError(f"`ingest_text.source`: {source} does not exist (a relative path: in {root})")


@serve_app.command("vision")
def serve_vision(
    model: Annotated[
        str, typer.Option(help="registered model; empty: the one of params.yaml's data set")
    ] = "",
    alias: Annotated[str, typer.Option(help="which version: its alias")] = "champion",
    version: Annotated[str, typer.Option(help="which version: its number, instead of an alias")] = "",
    host: Annotated[str, typer.Option(help="address to listen on; empty: params.yaml")] = "",
    port: Annotated[int, typer.Option(help="port; -1: params.yaml")] = -1,
    variant: Annotated[str, typer.Option(help="fp32 or int8; empty: params.yaml")] = "",
) -> None:
    """Serve an image classifier over HTTP (Open Inference Protocol v2 and POST /v1/classify)."""
    from flows.serve import serve_registered

    given = {"host": host, "port": port if port >= 0 else "", "variant": variant}
    overrides = {key: value for key, value in given.items() if value != ""}
    serve_registered(params.load(), model, alias, version, overrides)


@serve_app.command("language")
def serve_language(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="folder that `export language` wrote")
    ] = None,
    model: Annotated[str, typer.Option(help="registered model, instead of BUNDLE")] = "",
    alias: Annotated[str, typer.Option(help="which version of the model: its alias")] = "champion",
    version: Annotated[str, typer.Option(help="which version: its number, instead of an alias")] = "",
    attention_workers: Annotated[
        int, typer.Option(help="processes that keep keys and values; 0: none; -1: params.yaml")
    ] = -1,
    spares: Annotated[int, typer.Option(help="further ones that stand by; -1: params.yaml")] = -1,
    partition: Annotated[str, typer.Option(help="head, request or sequence; empty: params.yaml")] = "",
    host: Annotated[str, typer.Option(help="address to listen on; empty: params.yaml")] = "",
    port: Annotated[int, typer.Option(help="port, 0: any free one; -1: params.yaml")] = -1,
    cluster: Annotated[
        Path | None, typer.Option(help="file that says on which hosts attention workers run (docs/lamina.md)")
    ] = None,
    set_: Annotated[list[str], typer.Option("--set", help="key=value, may be repeated")] = [],  # noqa: B006
) -> None:
    """Serve a language model over HTTP (OpenAI's API), its attention in processes of their own."""
    from flows.lamina import Registered, serve_language

    if (bundle is None) == (not model):
        raise ConfigError("give the folder of a bundle, or --model with the name of a registered model")
    given = {
        "cluster.attention_workers": attention_workers,
        "cluster.spares": spares,
        "cluster.partition": partition,
        "http.host": host,
        "http.port": port,
    }
    flags = {key: value for key, value in given.items() if value not in ("", -1)}
    serve_language(bundle or Registered(model, alias, version), set_, flags, cluster)


@plan_app.command("train")
def plan_train(
    model: Annotated[str, typer.Option(help="backbone; empty: model.backbone of params.yaml")] = "",
    image_size: Annotated[int, typer.Option(help="pixels; 0: params.yaml")] = 0,
    window_size: Annotated[int, typer.Option(help="tokens; 0: params.yaml")] = 0,
    batch: Annotated[int, typer.Option(min=0, help="images per step; 0: params.yaml")] = 0,
    devices: Annotated[int, typer.Option(min=0, help="0: as few as will do")] = 0,
    device_memory_gb: Annotated[float, typer.Option(min=0.1, help="of one device, GiB")] = 80.0,
    precision: Annotated[str, typer.Option(help="bf16 or fp32")] = "bf16",
) -> None:
    """Say which ZeRO stage, micro-batch and how many devices a pretraining needs, and why."""
    from flows.planning.memory import ELEMENT, Network
    from flows.planning.training_plan import describe, plan_training

    checked = params.load(paths.workspace() / "params.yaml")
    if precision not in ELEMENT:
        raise ConfigError(f"--precision must be bf16 or fp32, found {precision!r}")
    window = window_size or checked.model.window_size
    if window is None:
        raise ConfigError("give --window-size: params.yaml names none for this backbone")
    network = Network(
        model or checked.model.backbone, image_size or checked.model.image_size, window, precision
    )
    found = plan_training(network, device_memory_gb, devices, batch or checked.pretrain.training.batch_size)
    print("\n".join(describe(found, network, device_memory_gb)))


@plan_app.command("serve")
def plan_serve(
    model: Annotated[
        str, typer.Option(help="llama-33b, llama-65b, llama3-70b, or a file of shapes (docs/planner.md)")
    ],
    trace: Annotated[Path, typer.Option(help="requests: Azure's CSV or Mooncake's JSON lines, also .gz")],
    hardware: Annotated[Path, typer.Option(help="devices with dated prices and efficiencies, YAML")],
    network: Annotated[str, typer.Option(help="nccl, fhbn, or a file")] = "nccl",
    policy: Annotated[Path | None, typer.Option(help="file with what differs from the usual policy")] = None,
    tbt_slo_ms: Annotated[float, typer.Option(min=0.0, help="between tokens; 0: as the policy")] = 0.0,
    ttft_slo_ms: Annotated[float, typer.Option(min=0.0, help="first token; 0: as the policy")] = 0.0,
    fault: Annotated[
        list[str], typer.Option(help="attention:TIME_S[:REPLACED_AFTER_S|never] or model:TIME_S:REPLACED_S")
    ] = [],  # noqa: B006
    hours_between_losses: Annotated[
        float, typer.Option(min=0.0, help="of each attention device, at random by --seed; 0: none")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    truth_check: Annotated[
        Path, typer.Option(help="comparison of the simulator with the engine on this machine")
    ] = Path("artifacts/lamina_truth_check.json"),
    without_truth_check: Annotated[
        bool, typer.Option("--without-truth-check", help="show figures that nothing vouches for")
    ] = False,
    out: Annotated[Path, typer.Option(help="all figures, JSON")] = Path("plan.json"),
    page: Annotated[Path | None, typer.Option(help="also a page with a picture, HTML")] = None,
) -> None:
    """Say which devices would serve a language model at what cost and speed, by simulation on a trace."""
    from flows.serve_planning import answer, read_question

    question = read_question(
        model,
        trace,
        hardware,
        network,
        policy,
        slos_ms=(tbt_slo_ms, ttft_slo_ms),
        faults=fault,
        hours_between_losses=hours_between_losses,
        seed=seed,
        truth_check=None if without_truth_check else truth_check,
    )
    answer(question, out, page)


ModelName = Annotated[
    str, typer.Option(help="registered model; empty: the one of params.yaml's data set or text")
]


@app.command()
def promote(
    model: ModelName = "",
    version: Annotated[str, typer.Option(help="its number; empty: the challenger")] = "",
    again: Annotated[bool, typer.Option("--again", help="also when it was rolled back before")] = False,
) -> None:
    """Try a registered version: every gate passed makes it champion; refused, the exit code is 10."""
    paths.workspace()
    from flows.live import print_gates
    from flows.promotion import promotion

    environment.interrupt_on_sigterm()
    try:
        made = promotion(model=model, version=version, again=again)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command starts again") from None
    if made.get("gates"):
        print_gates(made["gates"])
    if made["refused"]:
        live = f"champion stays version {made['champion']}" if made["champion"] else "there is no champion"
        raise GateFailed(f"version {made['version']} of {made['name']} is refused; {live}: {made['reason']}")
    if not made["version"]:
        print(made["reason"])
    else:
        print(f"version {made['version']} of {made['name']} is champion: {made['reason']}")


@app.command()
def rollback(model: ModelName = "") -> None:
    """Make the previous champion champion again, at once and without gates."""
    from flows import aliases
    from flows.serve import default_model

    checked = params.load()
    made = aliases.rollback(checked, model or default_model(checked))
    print(
        f"champion of {made.model} is version {made.to_version} again, instead of {made.from_version}. "
        "There is no previous version now: a second rollback is refused and does not go forward. "
        f"Version {made.from_version} comes back only with: "
        f"trunkline promote --model {made.model} --version {made.from_version} --again"
    )


@app.command()
def status(
    model: ModelName = "",
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Say what is live, since when, why, and from which data and commit."""
    from flows.live import print_status, read_status
    from flows.serve import default_model

    checked = params.load()
    found = read_status(checked, model or default_model(checked))
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print_status(found)


@app.command()
def monitor(
    model: Annotated[
        str, typer.Option(help="registered model; empty: the one of params.yaml's data set")
    ] = "",
    hours: Annotated[float, typer.Option(help="length of the window up to now; 0: params.yaml")] = 0.0,
) -> None:
    """Judge the served traffic: drift, latency, errors; an alarm can start the pipeline."""
    params.load()
    from flows.monitor import monitor as flow

    summary = flow(model=model, hours=hours)
    print(summary["verdict"])
    for text in summary["reasons"]:
        print(f"  {text}")
    for text in summary["unjudged"]:
        print(f"  not judged: {text}")
    if "report" in summary:
        print(f"{summary['action']}\n{summary['report']}")


@app.command()
def rollout(
    model: Annotated[
        str, typer.Option(help="registered model; empty: the one that params.yaml is about")
    ] = "",
    server: Annotated[
        list[str],
        typer.Option(help="URL of a server, may be repeated; none: rollout.servers, .language_servers"),
    ] = [],  # noqa: B006
) -> None:
    """Wait until all servers serve the champion, and compare their answers with the recorded ones."""
    from flows.rollout import find_servers
    from flows.rollout import rollout as flow

    # a mistake is found before a Prefect server is started for the flow
    found = find_servers(params.load(), model, server or None)
    for check in flow(model=found.version.name, servers=found.urls)["servers"]:
        print(f"{check['server']}: version {check['version']}, {check['reason']} ({check['seconds']:g} s)")


@app.command()
def trace(
    digest: Annotated[
        str, typer.Argument(help="at least 6 digits: as /healthz shows it, or of any file of the chain")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Follow a digest from the served model to the raw files, verifying every link; broken, the exit code is
    10."""
    from flows import custody
    from flows.custody_page import print_trace

    found = custody.trace(params.load(), digest)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        print_trace(found)
    if found.broken:
        raise GateFailed(
            f"the chain of custody is broken at: {', '.join(link.name for link in found.broken)}"
        )


@app.command()
def up(
    wait: Annotated[bool, typer.Option(help="return when all are ready, or at once")] = True,
    status: Annotated[bool, typer.Option("--status", help="only show what runs")] = False,
) -> None:
    """Start Prefect and MLflow servers, deployments and a worker in the background; schedules then run."""
    checked = params.load(paths.workspace() / "params.yaml")
    if not status:
        started = background.up(checked)
        print("starting" if started else "already up", flush=True)
        if wait:
            background.wait_until_ready(checked, lambda line: print(f"  {line}", flush=True))
    _show_services()


@app.command()
def down() -> None:
    """End everything that `up` started; a running stage saves its checkpoint first."""
    ended = background.down(params.load(paths.workspace() / "params.yaml"))
    print("down" if ended else "nothing was up")


@app.command()
def services() -> None:
    """Show what `up` started: status, pages, logs."""
    paths.workspace()
    _show_services()


def _show_services() -> None:
    found = background.running()
    if not found:
        print("nothing is up; `make up` starts it")
        return
    for service in found:
        status = background.probe(service)
        if service.restarts:
            status += f" ({service.restarts} restarts, last exit code {service.exit_code})"
        print(f"{service.name:<12} {status:<10} {service.page or '-':<28} {service.log}")


@app.command()
def sync() -> None:
    """Deliver what was logged while the tracking store was away."""
    from flows.tracking import deliver_leftovers

    paths.workspace()
    delivered, others = deliver_leftovers(params.load())
    print(f"runs delivered: {delivered}" if delivered else "nothing to deliver")
    if others:
        print(f"runs of another store: {others}; choose it by MLFLOW_TRACKING_URI or `tracking.uri`")


@app.command()
def deploy() -> None:
    """Bring the running Prefect server in line with a changed prefect.yaml."""
    checked = params.load(paths.workspace() / "params.yaml")
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigError("there is no Prefect server to deploy to; `make up` starts one and deploys")
    from flows.deployments import deploy as deploy_file

    for line in [*deploy_file(paths.home(), checked.services.work_pool), "deployed"]:
        print(line)


@app.command()
def ui(
    prefect_port: Annotated[int, typer.Option(help="port of Prefect's pages; -1: params.yaml")] = -1,
    mlflow_port: Annotated[int, typer.Option(help="port of MLflow's pages; -1: params.yaml")] = -1,
) -> None:
    """Start the pages of Prefect and MLflow, until Ctrl-C. (`up` keeps them in the background.)"""
    from flows.ui import show

    checked = params.load()
    settings = checked.services
    show(
        checked,
        settings.prefect_port if prefect_port < 0 else prefect_port,
        settings.mlflow_port if mlflow_port < 0 else mlflow_port,
    )


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="weights file, index of shards, or folder")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help=".safetensors, .pth, .pt, .bin; else a new folder")
    ],
    to: Annotated[str, typer.Option(help="layout: ours, official, timm or transformers")] = "ours",
    model: Annotated[str, typer.Option(help="its name; empty: told by the shapes")] = "",
    image_size: Annotated[int, typer.Option(min=0, help="pixels; 0: as the checkpoint tells")] = 0,
    window_size: Annotated[int, typer.Option(min=0, help="tokens; 0: as the checkpoint tells")] = 0,
    pretrained_windows: Annotated[
        str, typer.Option(help="Swin V2: window it was trained with, per stage, like 12,12,12,6")
    ] = "",
    head: Annotated[str, typer.Option(help="keep or drop the head and a pretext task's parts")] = "keep",
    tables: Annotated[
        str, typer.Option(help="resizing of V1's and ViT's position tables: bicubic or geometric")
    ] = "bicubic",
    force: Annotated[bool, typer.Option("--force", help="replace OUT")] = False,
    max_gb: Annotated[float, typer.Option(min=0.0, help="largest IN that is read, GiB; 0: 128")] = 0.0,
) -> None:
    """Convert published weights: official Swin, SimMIM and MoBY releases, timm, transformers, torchvision."""
    from flows.convert import convert as convert_weights

    lines = convert_weights(
        source,
        target,
        layout=to,
        name=model,
        image_size=image_size,
        window_size=window_size,
        pretrained_windows=pretrained_windows,
        head=head,
        tables=tables,
        force=force,
        max_gb=max_gb,
    )
    print("\n".join(lines))


@import_app.command("llama2c")
def import_llama2c(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="llama2.c model, version 0 (.bin)")],
    tokenizer: Annotated[Path, typer.Argument(metavar="TOKENIZER", help="its tokenizer (.bin)")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write, as Hugging Face has them")],
    force: Annotated[bool, typer.Option("--force", help="replace OUT")] = False,
) -> None:
    """Make a Hugging Face folder of a llama2.c model and its tokenizer."""
    from flows.language import import_llama2c as import_model

    print("\n".join(import_model(checkpoint, tokenizer, target, force=force)))


@export_app.command("language")
def export_language(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="decoder, as Hugging Face has them")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="bundle to write: a folder")],
    opset: Annotated[int, typer.Option(min=18, max=23, help="version of ONNX's operators")] = 20,
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, help="most that a logit may differ from the model's, or nothing is written"),
    ] = 1e-4,
    force: Annotated[bool, typer.Option("--force", help="replace OUT")] = False,
) -> None:
    """Cut a decoder at its attention into ONNX slices for Lamina, and check them against the model."""
    from flows.language import export_language as export_model

    export_model(model, target, opset=opset, tolerance=tolerance, force=force)


@app.command()
def report() -> None:
    """Write artifacts/report.html again from what the stages left."""
    from flows.report import build_report

    paths.workspace()
    print(build_report(Path.cwd(), {}))


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and an exit code (see flows.errors)."""
    environment.prepare()
    try:
        background.use_running()
        app(standalone_mode=False)
    except TrunklineError as error:
        _fail(str(error), error.exit_code)
    except typer.Abort:
        _fail("stopped", Interrupted.exit_code)
    except typer.Exit as error:
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        # typer's vendored click raises usage errors of its own
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _fail(error.format_message(), error.exit_code)
        explained = explain(error)
        if explained is None:
            raise
        _fail(str(explained), explained.exit_code)


def _fail(message: str, exit_code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    raise SystemExit(exit_code)


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "100")
    main()
