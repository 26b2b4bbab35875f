"""The wheel holds both packages, and Ray workers outside the checkout import them from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.waiting import run

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json
import ray

if __name__ == "__main__":
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20)

    @ray.remote
    def where():
        import actors.job, rlsys.loop
        from rlsys.report.page import write_report
        return [actors.__file__, rlsys.__file__]

    print(json.dumps(ray.get(where.remote())))
    ray.shutdown()
"""


def test_an_installed_wheel_is_imported_by_a_ray_worker_started_outside_the_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site, elsewhere = tmp_path / "wheels", tmp_path / "site", tmp_path / "elsewhere"
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ROOT], check=True)
    (wheel,) = wheels.glob("rlsys-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    elsewhere.mkdir()
    (elsewhere / "program.py").write_text(PROGRAM)
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"PYTHONPATH": str(site), "HOME": str(tmp_path)}
    done = run([sys.executable, "program.py"], cwd=elsewhere, env=env)
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout.splitlines()[-1])
    assert all(file.startswith(str(site)) for file in files), files
    assert (site / "rlsys" / "report" / "templates" / "report.html.j2").is_file() and (
        site / "rlsys" / "py.typed"
    ).is_file()
