"""Files of the planner: strict, and every mistake names file and key."""

import gzip

import numpy as np
import pytest
import yaml

from flows.errors import ConfigError, DataError
from flows.serving.lamina.simulator import inputs
from flows.serving.lamina.simulator.traces import read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"


def write(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def hardware(root):
    return yaml.safe_load((root / "benchmarks/planner/hardware.yaml").read_text())


def test_examples_and_bundled_files_are_valid(root):
    folder = root / "benchmarks/planner"
    devices = inputs.read_hardware(folder / "hardware.yaml").devices
    assert (devices["h100"].price_per_hour, devices["h20"].price_per_hour) == (11.06, 4.63)
    assert all(device.price_date.isoformat() == "2025-04-10" for device in devices.values())
    assert inputs.read_network(str(folder / "network.yaml")).gb_s == 35.5
    assert inputs.read_policy(folder / "policy.yaml").search.attention_devices == [2, 4, 8]
    weights = [inputs.read_model(name).weight_bytes / 1e9 for name in inputs.bundled("model")]
    assert weights == [64.7, 130.1, 137.5]


def test_no_price_is_known_to_the_package():
    for path in inputs.BUNDLED.iterdir():
        assert " price_per_hour" not in path.read_text()
        assert not path.name.endswith(".hardware.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"price_date": None}, "devices.h100.price_date"),
        ({"mfu": 0.0}, "devices.h100.mfu"),
        ({"mfu": 1.2}, "devices.h100.mfu"),
        ({"memory_gb_s": float("nan")}, "devices.h100.memory_gb_s"),
        ({"tflops": "989"}, "devices.h100.tflops"),
        ({"tflop": 989}, "unknown key `devices.h100.tflop`"),
        ({"price_per_hour": -1.0}, "devices.h100.price_per_hour"),
    ],
)
def test_device_mistakes_name_file_and_key(tmp_path, hardware, change, words):
    hardware["devices"]["h100"].update(change)
    path = write(tmp_path / "mine.yaml", yaml.safe_dump(hardware))
    with pytest.raises(ConfigError) as error:
        inputs.read_hardware(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)


def test_a_device_without_a_dated_price_is_refused(tmp_path, hardware):
    del hardware["devices"]["h20"]["price_date"]
    with pytest.raises(ConfigError, match=r"missing key `devices\.h20\.price_date`"):
        inputs.read_hardware(write(tmp_path / "mine.yaml", yaml.safe_dump(hardware)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found nothing"),
        ("- 1\n", "found list"),
        ("a: [", "not valid YAML"),
        ("name: x\nname: y\n", "`name` is there twice"),
        ("1: x\n", "key 1 is not text"),
        ("\x00", "not valid YAML"),
        ("price_date: 2025-02-31\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_mapping(tmp_path, text, words):
    path = write(tmp_path / "model.yaml", text)
    with pytest.raises(ConfigError, match=words) as error:
        inputs.read_model(str(path))
    assert str(path) in str(error.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        inputs.read_hardware(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        inputs.read_hardware(tmp_path)
    with pytest.raises(ConfigError, match="llama3-70b"):
        inputs.read_model("gpt-9")


def test_shapes_have_to_fit_together(tmp_path):
    values = yaml.safe_load((inputs.BUNDLED / "llama3-70b.model.yaml").read_text())
    with pytest.raises(ConfigError, match="64 `heads` do not divide over 7"):
        inputs.read_model(str(write(tmp_path / "a.yaml", yaml.safe_dump(values | {"kv_heads": 7}))))
    with pytest.raises(ConfigError, match="2 entries for 80"):
        inputs.read_model(str(write(tmp_path / "b.yaml", yaml.safe_dump(values | {"windows": [1, 2]}))))


def test_policy_files_change_only_what_they_name(tmp_path):
    path = write(tmp_path / "p.yaml", "overlap: false\nsearch: {requests: 60}\n")
    found = inputs.read_policy(path)
    assert not found.overlap
    assert found.search.requests == 60
    assert found.search.partitions == ["head", "request", "sequence"]
    with pytest.raises(ConfigError, match=r"p\.yaml: unknown key `search\.request`"):
        inputs.read_policy(write(path, "search: {request: 60}\n"))


# --- traces


def test_azure_and_mooncake_are_read_plain_and_packed(tmp_path):
    text = AZURE + "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109\r\n"
    plain = read_trace(write(tmp_path / "a.csv", text))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(text.encode()))
    packed = read_trace(tmp_path / "b.csv.gz")
    assert plain.prompt.tolist() == packed.prompt.tolist() == [374, 396]
    assert plain.output.tolist() == [44, 109]
    np.testing.assert_allclose(plain.arrival_s, [0.0, 4.314579], atol=1e-6)
    assert packed.name == "b"
    lines = '{"timestamp": 5000, "input_length": 7, "output_length": 2, "hash_ids": [0]}\n' * 2
    mooncake = read_trace(write(tmp_path / "c.jsonl", lines.replace("5000", "3000", 1)))
    assert mooncake.arrival_s.tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (AZURE, "has no requests"),
        ("a,b\n1,2\n", "line 1"),
        (AZURE + "2023-11-16 18:15:46,374,44\n2023-11-16 18:15:46,374\n", "line 3"),
        (AZURE + "yesterday,374,44\n", "line 2"),
        (AZURE + "2023-11-16 18:15:46,0,44\n", "line 2"),
        (AZURE + "2023-11-16 18:15:46,1e3,44\n", "line 2"),
        (AZURE + "2023-11-16 18:15:46,99999999999,44\n", "line 2"),
        ('{"timestamp": 1, "input_length": 7}\n', "line 1"),
        ('{"timestamp": NaN, "input_length": 7, "output_length": 2}\n', "line 1"),
        ('{"timestamp": 1, "input_length": 7, "output_length": 2}\n{"timestamp": 1, "inp\n', "line 2"),
        ('{"timestamp": 1, "input_length": true, "output_length": 2}\n', "line 1"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_other_formats_are_refused_with_the_line(tmp_path, text, words):
    path = write(tmp_path / "t", text)
    with pytest.raises(DataError, match=words) as error:
        read_trace(path)
    assert str(path) in str(error.value)


def test_damaged_archives_and_missing_traces(tmp_path):
    whole = gzip.compress((AZURE + "2023-11-16 18:15:46,374,44\n" * 5000).encode())
    for name, data in {"cut.gz": whole[: len(whole) // 2], "turned.gz": whole[:-6] + b"\0" * 6}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="damaged archive"):
            read_trace(tmp_path / name)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="line 1"):
        read_trace(tmp_path / "binary.csv")
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError, match="does not exist"):
            read_trace(path)


def test_published_traces_have_the_papers_means(root):
    folder = root.parent / "shared/data/llm_traces"
    if not folder.is_dir():
        pytest.skip(f"no traces in {folder}")
    azure = read_trace(folder / "azure_2023_conversation.csv.gz")
    kimi = read_trace(folder / "mooncake_fast25_conversation.jsonl.gz")
    found = [(len(t), round(t.mean_prompt, 1), round(t.mean_output, 1)) for t in (azure, kimi)]
    assert found == [(19366, 1154.7, 211.1), (12031, 12035.1, 342.6)]
    assert np.percentile(azure.prompt, [50, 90, 99]) == pytest.approx([1020, 2735, 4142], abs=1)
    assert [round(t.live_context) for t in (azure, kimi)] == pytest.approx([1227, 13126], abs=1)
    with pytest.raises(DataError, match="line 1"):  # lengths without arrivals are no trace
        read_trace(folder / "arxiv_summarization_lengths.csv.gz")


def test_rescaling_keeps_arrivals_and_meets_the_means(tmp_path):
    text = AZURE + "".join(f"2023-11-16 18:15:{i:02d},{100 + 50 * i},{10 + i}\n" for i in range(50))
    found = read_trace(write(tmp_path / "a.csv", text))
    scaled = found.rescaled("other", 4000.0, 50.0)
    assert scaled.mean_prompt == pytest.approx(4000.0, rel=1e-3)
    assert scaled.mean_output == pytest.approx(50.0, rel=0.02)
    assert scaled.arrival_s is found.arrival_s
    assert found.faster(2.0).span_s == found.span_s / 2
