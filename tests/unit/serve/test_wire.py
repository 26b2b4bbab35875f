"""The codec against bytes that are written by hand from the protocol's field numbers, and what it refuses."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pytest

from rlsys import losses
from rlsys.rollouts import LENGTH, STOP
from rlsys.serve.errors import Refusal, public_text
from rlsys.serve.wire import messages, passes
from rlsys.serve.wire.json_body import load
from rlsys.serve.wire.passes import OutputLayout
from rlsys.serve.wire.proto_file import read_proto
from rlsys.serve.wire.results import PassResult, SampleResult, laid_out

VARINT, FIXED64, BYTES = 0, 1, 2


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def tagged(number: int, kind: int, content: bytes) -> bytes:
    return varint(number << 3 | kind) + content


def field(number: int, content: bytes | str) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return tagged(number, BYTES, varint(len(raw)) + raw)


def entry(number: int, key: str, value: bytes) -> bytes:
    return field(number, field(1, key) + value)


def number_field(number: int, value: int) -> bytes:
    return tagged(number, VARINT, varint(value))


def double(number: int, value: float) -> bytes:
    return tagged(number, FIXED64, struct.pack("<d", value))


def tensor(data: bytes, dtype: int, shape: Iterable[int]) -> bytes:
    return field(1, data) + number_field(3, dtype) + field(4, b"".join(map(varint, shape)))


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def longs(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def chunk(*tokens: int) -> bytes:
    return field(1, field(1, field(1, ints(*tokens))))


SPAN = field(3, field(2, field(1, "sequence") + number_field(2, 1) + number_field(3, 2)))  # ProvenanceSpan: ignored
DATUM = (
    chunk(1, 2)
    + chunk(3)
    + entry(2, "target_tokens", field(2, tensor(longs(2, 3, 4), 2, [3])))
    + entry(2, "weights", field(2, tensor(floats(1.0, 0.5, -1.0), 1, [3])))
    + SPAN
)
REQUEST = (
    field(1, "abc:train:0")
    + number_field(2, 7)
    + field(3, DATUM)
    + field(4, "ppo")
    + entry(5, "clip_low_threshold", double(2, 0.9))
    + number_field(6, 1)
    + entry(7, "clip_high_threshold", field(2, double(1, 1.5)))
    + field(99, b"later")
)


def test_a_request_is_read_by_the_protocols_field_numbers() -> None:
    found = passes.read_protobuf(REQUEST)
    assert (found.model_id, found.seq_id, found.loss_fn, found.forward_only) == ("abc:train:0", 7, "ppo", True)
    assert found.loss_fn_config == {"clip_low_threshold": 0.9, "clip_high_threshold": 1.5}
    (datum,) = found.data
    assert datum.tokens.tolist() == [1, 2, 3]
    assert datum.inputs["target_tokens"].tolist() == [2, 3, 4] and datum.inputs["target_tokens"].dtype == np.int64
    assert datum.inputs["weights"].tolist() == [1.0, 0.5, -1.0] and datum.inputs["weights"].dtype == np.float32


@pytest.mark.parametrize(
    ("encoded", "wanted"),
    [
        (tensor(ints(5, -6), 3, [2]), [5, -6]),
        (tensor(struct.pack("<2H", 0x3F80, 0xBFC0), 4, [2]), [1.0, -1.5]),  # bfloat16
        (tensor(longs(5, 6), 2, [2]), [5, 6]),
        (tensor(floats(0.5), 1, []), 0.5),
        (tensor(floats(1, 2, 3, 4), 1, [2, 2]), [[1, 2], [3, 4]]),
        (
            field(2, field(1, floats(7, 8)) + field(2, longs(0, 0, 2)) + field(3, longs(0, 2)))
            + number_field(3, 1)
            + field(4, varint(2) + varint(3)),
            [[0, 0, 0], [7, 0, 8]],
        ),
    ],
)
def test_tensors_are_read_in_every_dtype_and_layout(encoded: bytes, wanted: object) -> None:
    body = field(1, "m") + field(3, chunk(1, 2) + entry(2, "weights", field(2, encoded))) + field(4, "cross_entropy")
    (datum,) = passes.read_protobuf(body).data
    assert datum.inputs["weights"].tolist() == wanted


def csr(values: bytes, crow: bytes, columns: bytes, shape: Iterable[int]) -> bytes:
    inner = field(1, values) + field(2, crow) + field(3, columns)
    return field(2, inner) + number_field(3, 1) + field(4, b"".join(map(varint, shape)))


HUGE = 2**40
WRONG_TENSORS = {
    "no dtype": (tensor(floats(1, 2), 0, [2]), "found dtype 0"),
    "dtype from elsewhere": (tensor(floats(1, 2), 9, [2]), "found dtype 9"),
    "cut bytes": (tensor(floats(1, 2)[:-1], 1, [2]), "found 7 bytes; wanted a multiple of 4"),
    "shape of more": (tensor(floats(1, 2), 1, [3]), r"found 2 values for shape \[3\]"),
    "shape of terabytes": (tensor(floats(1, 2), 1, [HUGE, HUGE]), "found 2 values for shape"),
    "negative shape": (tensor(floats(1, 2), 1, [2**64 - 1, 2**64 - 2]), "found 2 values for shape"),
    "three axes": (tensor(floats(1, 2), 1, [1, 2, 1]), r"\(N,\) or \(N, K\)"),
    "csr of terabytes": (csr(b"", longs(0, 0, 0), b"", [2, HUGE]), "K from 1 to"),
    "csr of other rows": (csr(b"", longs(0, 0, 0, 0), b"", [3, 2]), r"wanted \[2, K\]"),
    "csr that goes back": (csr(floats(1), longs(0, 1, 0), longs(0), [2, 2]), "CSR indices that do not fit"),
    "csr that starts late": (csr(floats(1), longs(1, 1, 1), longs(0), [2, 2]), "CSR indices that do not fit"),
    "csr without rows": (csr(b"", b"", b"", [2, 2]), "CSR indices that do not fit"),
    "csr column": (csr(floats(1), longs(0, 1, 1), longs(2), [2, 2]), "CSR columns outside of 0 to 1"),
    "csr negative column": (csr(floats(1), longs(0, 1, 1), longs(-1), [2, 2]), "CSR columns outside"),
}


@pytest.mark.parametrize(("encoded", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_a_tensor_that_does_not_fit_is_refused_before_anything_is_allocated(encoded: bytes, message: str) -> None:
    body = field(1, "m") + field(3, chunk(1, 2) + entry(2, "weights", field(2, encoded))) + field(4, "cross_entropy")
    with pytest.raises(Refusal, match=message) as refused:
        passes.read_protobuf(body)
    assert refused.value.status == 400 and "datum 0: loss_fn_inputs['weights']" in refused.value.detail


def test_a_truncated_request_is_never_read_as_the_complete_one() -> None:
    last = len(field(99, b"later"))  # a later field, without which the request is the same
    read: list[passes.PassRequest | None] = []
    for end in range(1, len(REQUEST) - last):
        try:
            read.append(passes.read_protobuf(REQUEST[:end]))
        except Refusal as refusal:
            read += [None] if refusal.status == 400 else []
    assert len(read) == len(REQUEST) - last - 1
    whole = passes.read_protobuf(REQUEST)
    assert all(found is None or found.loss_fn_config != whole.loss_fn_config for found in read)
    assert read.count(None) > len(read) / 2


def test_images_are_refused_by_name() -> None:
    image = field(1, field(2, field(1, b"\x89PNG") + field(2, "png")))
    with pytest.raises(Refusal, match="datum 0: model_input: found a chunk of kind image; wanted chunks of token ids"):
        passes.read_protobuf(field(1, "m") + field(3, image) + field(4, "cross_entropy"))


def request(loss_fn: str = "cross_entropy", **inputs: np.ndarray) -> passes.PassRequest:
    datum = passes.WireDatum(np.array([1, 2, 3]), {"target_tokens": np.array([2, 3, 4]), **inputs})
    return passes.PassRequest("m", 1, [datum, datum], loss_fn, {}, False)


def prepare(asked: passes.PassRequest) -> passes.PreparedPass:
    return passes.prepare(asked, vocab_size=10, max_length=8, max_datums=4)


REFUSED_PASSES = {
    "unknown loss": (request("grpo"), "loss_fn: found 'grpo'; wanted one of cross_entropy"),
    "stable_reinforce": (request("stable_reinforce"), "its formula is not public; pass loss_fn=importance_sampling"),
    "missing input": (request("ppo"), r"datum 0: loss_fn_inputs\['advantages'\] is missing"),
    "2-D targets for RL": (
        request("ppo", target_tokens=np.ones((3, 2), int), logprobs=np.zeros(3), advantages=np.zeros(3)),
        r"found shape \(3, 2\); wanted \(3,\) for 'ppo'",
    ),
    "wrong length": (request(weights=np.ones(2)), r"datum 0: loss_fn_inputs\['weights'\]: found shape \(2,\)"),
    "nan": (request(weights=np.array([1.0, np.nan, 1.0])), "datum 0: .*found nan at position 1"),
    "fractional targets": (request(target_tokens=np.array([1.5, 2, 3])), "found dtype float64; wanted integer"),
    "vocabulary": (request(target_tokens=np.array([1, 2, 10])), "found 10 at position 2; wanted ids from 0 to 9"),
}


@pytest.mark.parametrize(("asked", "message"), REFUSED_PASSES.values(), ids=REFUSED_PASSES)
def test_data_that_cannot_be_trained_on_is_refused_with_place_and_value(
    asked: passes.PassRequest, message: str
) -> None:
    with pytest.raises(Refusal, match=message) as refused:
        prepare(asked)
    assert refused.value.status == 400


def test_the_number_of_datums_is_limited() -> None:
    one = request().data[0]
    asked = passes.PassRequest("m", 1, [one] * 5, "cross_entropy", {}, False)
    with pytest.raises(Refusal, match=r"data: found 5 datums; wanted 1 to 4 \(limits.datums\)"):
        prepare(asked)


def test_weights_that_are_absent_are_ones() -> None:
    assert prepare(request()).batch.columns["weights"].tolist() == [1.0] * 6


def test_zstd_is_cut_off_at_the_limit_while_it_decompresses() -> None:
    bomb = pa.compress(bytes(2**28), codec="zstd", asbytes=True)
    assert len(bomb) < 100_000
    began = time.process_time()
    with pytest.raises(Refusal) as refused:
        passes.decompress(bomb, "zstd", 2**20)
    assert refused.value.status == 413 and time.process_time() - began < 0.5
    assert passes.decompress(pa.compress(b"abc" * 1000, codec="zstd", asbytes=True), "zstd", 3000) == b"abc" * 1000
    for body, encoding in ((b"no zstd", "zstd"), (b"abc", "gzip"), (b"abc", "br")):
        with pytest.raises(Refusal) as refused:
            passes.decompress(body, encoding, 100)
        assert refused.value.status == 400


def test_five_megabytes_become_columns_in_a_moment() -> None:
    random, message = np.random.default_rng(0), messages.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="ppo")
    for _ in range(400):
        datum, N = message.data.add(), 512
        datum.model_input.add().encoded_text.tokens = random.integers(0, 1000, N).astype("<i4").tobytes()
        for key, values, dtype in (
            ("target_tokens", random.integers(0, 1000, N).astype("<i8"), messages.INT64),
            ("logprobs", random.normal(size=N).astype("<f4"), messages.FLOAT32),
            ("advantages", random.normal(size=N).astype("<f4"), messages.FLOAT32),
        ):
            datum.loss_fn_inputs[key].dense = values.tobytes()
            datum.loss_fn_inputs[key].dtype = dtype
            datum.loss_fn_inputs[key].shape.append(N)
    body = message.SerializeToString()
    losses.resolve("ppo")  # imports torch
    seconds = []
    for _ in range(3):
        began = time.process_time()
        prepared = passes.prepare(passes.read_protobuf(body), vocab_size=1000, max_length=512, max_datums=4096)
        seconds.append(time.process_time() - began)
    assert len(body) > 4_000_000 and len(prepared.batch.tokens) == 400 * 512
    loop = _seconds_of_a_loop(3 * 400 * 512)
    assert min(seconds) < 1.5 * loop, (seconds, loop)


def _seconds_of_a_loop(values: int) -> float:
    """Of Python that does no more than to read so many values one by one into an array."""
    given = np.zeros(values, "<f4")
    began = time.process_time()
    np.fromiter((float(value) for value in given), np.float64, values)
    return time.process_time() - began


def test_an_answer_has_one_record_per_stretch_of_equal_shape() -> None:
    layout = OutputLayout(np.array([2, 1, 2, 3]), np.array([0, 0, 2, 0]))
    logprobs = np.arange(10, dtype=np.float32)
    message = messages.ForwardBackwardOutput()
    message.ParseFromString(PassResult({"loss:sum": 1.5}, logprobs, layout).encode(True).body)
    found = [
        (
            record.num_datums,
            list(record.fields["logprobs"].trailing_shape),
            np.frombuffer(record.fields["logprobs"].data, "<f4").tolist(),
            np.frombuffer(record.fields["logprobs"].offsets, "<i8").tolist(),
        )
        for record in message.loss_fn_outputs
    ]
    assert found == [
        (2, [], [0.0, 1.0, 2.0], [0, 8, 12]),
        (1, [2], [3.0, 4.0, 5.0, 6.0], [0, 16]),
        (1, [], [7.0, 8.0, 9.0], [0, 12]),
    ]
    outputs = json.loads(PassResult({}, logprobs, layout).encode(False).body)["loss_fn_outputs"]
    assert [output["logprobs"]["shape"] for output in outputs] == [[2], [1], [2, 2], [3]]


def test_values_of_several_targets_come_back_in_c_order() -> None:
    layout = OutputLayout(np.array([1, 3]), np.array([0, 2]))
    from_learner = np.array([9, 0, 2, 4, 1, 3, 5], np.float32)  # the second datum as two of three positions
    assert laid_out(from_learner, layout).tolist() == [9, 0, 1, 2, 3, 4, 5]


def test_a_sample_is_the_same_in_both_forms() -> None:
    result = SampleResult(
        np.array([1, 2, 3], np.int32),
        np.array([-1.0, -2.0, -3.0], np.float32),
        np.array([0, 2, 3]),
        np.array([LENGTH, STOP]),
        np.array([np.nan, -0.5], np.float32),
        np.array([[0, 0], [7, 8]], np.int32),
        np.array([[-99999.0, -99999.0], [-0.1, -0.2]], np.float32),
        ("a", "b"),
    )
    message = messages.SampleResponse()
    message.ParseFromString(result.encode(True).body)
    assert [(each.stop_reason, np.frombuffer(each.tokens, "<i4").tolist()) for each in message.sequences] == [
        (1, [1, 2]),
        (0, [3]),
    ]
    assert np.frombuffer(message.sequences[0].logprobs, "<f4").tolist() == [-1.0, -2.0]
    assert np.isnan(np.frombuffer(message.prompt_logprobs, "<f4")[0])
    topk = message.topk_prompt_logprobs
    assert (topk.length, topk.k, np.frombuffer(topk.token_ids, "<i4").tolist()) == (2, 2, [0, 0, 7, 8])
    value = json.loads(result.encode(False).body)
    assert value["sequences"][0] == {
        "stop_reason": "length",
        "tokens": [1, 2],
        "logprobs": [-1.0, -2.0],
        "sequence_id": "a",
    }
    assert value["prompt_logprobs"] == [None, -0.5]
    assert value["topk_prompt_logprobs"][0] is None and [pair[0] for pair in value["topk_prompt_logprobs"][1]] == [7, 8]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model_id": "a", "model_id": "b"}', "found the key 'model_id' twice in one object"),
        (b'{"a": {"b": 1, "b": 1}}', "found the key 'b' twice"),
        (b'{"a": NaN}', "found NaN, which is not JSON"),
        (b'{"a": -Infinity}', "found -Infinity"),
        (b"\xff{}", "no UTF-8 at 0"),
        (b"", "found none"),
        (b"[" * 40_000, "nested too deeply"),
        (b"[" * 100_000, "found JSON with 100000 brackets; wanted at most 50000"),
        (b"{", "no valid JSON"),
    ],
)
def test_json_that_two_readers_could_take_differently_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(Refusal, match=message) as refused:
        load(body)
    assert refused.value.status == 400


def test_a_server_folder_in_an_error_becomes_its_public_name_or_none() -> None:
    names = {
        "/data/models/m": "m",
        "/data/ckpt/one/run/weights/a": "tinker://run/weights/a",
        "/served/by/path": "/served/by/path",
    }
    text = (
        "/data/ckpt/one/run/weights/a: of '/data/models/m' and /home/u/.cache/x.bin (see http://a/b/c), /served/by/path"
    )
    assert public_text(text, names) == (
        "tinker://run/weights/a: of 'm' and (a folder of the server) (see http://a/b/c), /served/by/path"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("service S {}", "found 'service'; wanted syntax"),
        ('syntax = "proto2";', "found '\"proto2\"'; wanted '\"proto3\"'"),
        ("message A { B b = 1; }", "found the type 'B'"),
        ("message A { string a 1; }", "found '1'; wanted '='"),
    ],
)
def test_a_proto_file_beyond_the_reader_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_proto(text, "some.proto")
