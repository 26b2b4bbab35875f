"""Driver, reward and advantage actor and HTTP process work without torch, vLLM and the models of transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
from rlsys.config import MakeSection, parse_config
from rlsys.modeling.base_model import initial_model
from rlsys.tasks import build

ROOT = Path(__file__).parents[3]
HEAVY = "('torch', 'vllm', 'peft', 'sympy', 'datasets', 'pandas', 'pyarrow', 'wandb', 'tensorboard')"
SHAPE = MakeSection(
    vocab_size=160, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=24
)
JOB = """
run: {name: light, seed: 5}
model: {dtype: float32, max_length: 96}
task: {train_problems: 16, eval_problems: 4}
rl: {problems_per_step: 2, samples_per_problem: 2, sampling: {max_tokens: 4}, loss: {name: ppo}}
"""
SETUP = f"""
import sys
from pathlib import Path
import numpy as np
from rlsys.config import parse_config
base, run_dir = sys.argv[1:]
from rlsys.rollouts import Rollouts
config = parse_config({JOB!r}, [f"model.path={{base}}", f"run.dir={{run_dir}}"])
def rollouts():
    return Rollouts(
        problems=np.arange(2), prompt_tokens=np.array([3, 4], np.int32), prompt_offsets=np.array([0, 1, 2]),
        group=np.array([0, 0, 1, 1], np.int32), tokens=np.arange(5, 13, dtype=np.int32),
        logprobs=np.full(8, -1.0, np.float32), versions=np.zeros(8, np.int32), offsets=np.arange(0, 9, 2),
        stop_reasons=np.zeros(4, np.int8),
    )
def loaded():
    named = [name for name in {HEAVY} if name in sys.modules]
    return named + [name for name in sys.modules if name.startswith("transformers.models.") and "modeling" in name]
"""
DRIVER = """
import actors.evaluation, actors.job
from rlsys import losses
from rlsys.architectures.support import refuse_unsupported_job
from rlsys.planning.model_folder import check_job
from rlsys.run_state.run_dir import RunStore
from rlsys.utils.packed_folder import pack_folder
from rlsys.weight_sync.update import AdapterSnapshot, Attestation, WeightUpdate
losses.resolve(config.rl.loss.name, config.rl.loss.params)
refuse_unsupported_job(config)
check_job(config)
pack_folder(Path(base))
"""
REWARD_ACTOR = """
from actors.reward_actor import RecordRequest, RewardActor, ShowRequest
actor = RewardActor(config)
actor.start(base)
rewards, _ = actor.grade("train", rollouts())
actor.show(ShowRequest("train", 2, (), (1, 1, 0, 0, 0)), rollouts(), rewards)
actor.write_problems(run_dir)
actor.record(RecordRequest(run_dir, 1, 0, 1, (1, 1, 0)), rollouts(), rewards)
actor.stop()
"""
ADVANTAGE_ACTOR = """
from actors.advantage_actor import AdvantageRequest, GroupAdvantageActor
actor = GroupAdvantageActor(config.rl)
actor.compute_advantages(AdvantageRequest(1, (1, 1, 0)), rollouts(), np.array([1, 0, 0, 1], np.float32))
"""

HTTP_PROCESS = """
import actors.front.http_process
from rlsys.client.backend import About
from rlsys.serve.openai.text import TextCodec
files = {file.name: file.read_bytes() for file in Path(base).iterdir() if file.suffix == ".json"}
codec = TextCodec(About("base", base, "x", 160, 96, 8, 8.0, True, files, None))
(ids,) = codec.encode(["1 + 2 ="], True)
assert codec.decode(ids) == "1 + 2 =" and codec.token(ids[0]).text == "1"
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("light") / "base"
    texts = [str(problem.prompt) for problem in build(parse_config(JOB, ["model.path=x"]).task, 0).problems("train")]
    initial_model(SHAPE, build_tokenizer(texts, SHAPE.vocab_size), 96, 0, folder)
    return folder


PROCESSES = {"driver": DRIVER, "reward": REWARD_ACTOR, "advantage": ADVANTAGE_ACTOR, "http": HTTP_PROCESS}


@pytest.mark.parametrize("work", PROCESSES.values(), ids=PROCESSES)
def test_a_process_that_holds_no_weights_works_without_torch(work: str, base: Path, tmp_path: Path) -> None:
    # Without collections of garbage, and without taking all modules apart: a third of its time.
    script = f"import gc, os; gc.disable()\n{SETUP}{work}\nprint(loaded(), flush=True); os._exit(0)"
    command = [sys.executable, "-c", script, str(base), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    decodes_bodies = work == HTTP_PROCESS
    assert done.stdout.splitlines()[-1] == ("['pyarrow']" if decodes_bodies else "[]")
