"""The label store is identical for any number of ranks, also if ranks are killed."""

import signal
import subprocess

import pytest

from evocomp.labels.store import LabelStore


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Digest of the store that one process makes without any distribution."""
    from scenarios import TINY, digest

    from evocomp import cli

    folder = tmp_path_factory.mktemp("alone")
    assert cli.main(["label", f"--labels.dir={folder}/labels", f"--run_dir={folder}/run", *TINY]) == 0
    return digest(f"{folder}/labels")


def chunks(folder) -> list[int]:
    return LabelStore(folder).stored(0)


@pytest.mark.parametrize(
    ("world", "how"),
    [(2, {}), *(pytest.param(3, how, marks=pytest.mark.slow) for how in ({}, {"static": True}))],
)
def test_several_ranks_make_identical_labels(ranks, alone, tmp_path, world, how):
    job = ranks(world, "label", folder=str(tmp_path / "labels"), **how).succeeded()
    assert {result["digest"] for result in job.results} == {alone}


# ------------------------------------------------------------ one model held by several processes

# four batches per population, which the members divide; optimizations that a sharded model does not support
SHARDED = ["labels.batch=2", "scorer.own_pass=false", "scorer.shared_prefix=never", "scorer.prefix_reuse=never"]
KINDS = {
    "hard": [],
    "hill_climb": ["search.strategy=hill_climb"],
    "credit": ["labels.target=credit", "labels.refresh=none", "loss.name=listwise", "labels.credit_masks=8"],
}


def unsharded(folder, settings: list[str]) -> str:
    from scenarios import TINY, digest

    from evocomp import cli

    words = ["label", f"--labels.dir={folder}/one", f"--run_dir={folder}/run", *TINY, *SHARDED, *settings]
    assert cli.main(words) == 0
    return digest(f"{folder}/one")


@pytest.mark.parametrize("kind", ["hard", *(pytest.param(k, marks=pytest.mark.slow) for k in ("hill_climb", "credit"))])
def test_two_processes_with_half_the_layers_each_make_the_same_bytes(ranks, tmp_path, kind):
    settings = [*SHARDED, *KINDS[kind], "model.shard=2"]
    job = ranks(2, "label", folder=str(tmp_path / "labels"), settings=settings).succeeded()
    assert {result["digest"] for result in job.results} == {unsharded(tmp_path, KINDS[kind])}
    assert [result["made"] for result in job.results] == [12, 12]  # both process all samples together
    scored = [result["forwards"] for result in job.results]
    assert abs(scored[0] - scored[1]) < 0.2 * sum(scored) < sum(scored)  # and score half of the masks each


@pytest.mark.slow
def test_shard_groups_share_a_queue_and_survive_each_other(ranks, tmp_path):
    settings = [*SHARDED, "model.shard=2"]
    alone = unsharded(tmp_path, [])
    job = ranks(4, "label", folder=str(tmp_path / "whole"), settings=settings).succeeded()
    assert {result["digest"] for result in job.results} == {alone}
    made = [result["made"] for result in job.results]
    assert made[0] == made[1] > 0 and made[2] == made[3] > 0 and made[0] + made[2] == 12
    # a follower dies: its leader stops, and the other group finishes the work
    folder = str(tmp_path / "labels")
    job = ranks(4, "label", folder=folder, settings=settings, signal_rank=3)
    assert job.codes[3] == -signal.SIGKILL and job.codes[2] not in (0, None) and job.codes[:2] == [0, 0], job.outputs
    assert job.results[0]["digest"] == alone
    assert any("takes over chunk" in output and "of rank 2" in output for output in job.outputs[:2])


@pytest.mark.slow
def test_a_stop_reaches_the_whole_shard_group(ranks, tmp_path):
    """SIGTERM is sent to one of two processes that run every forward pass together."""
    settings, folder = [*SHARDED, "model.shard=2"], str(tmp_path / "labels")
    options = {"signal_rank": 1, "number": signal.SIGTERM, "chunks": 0}
    job = ranks(2, "label", folder=folder, settings=settings, **options)
    assert job.codes == [2, 2] and all("stopped during labelling" in output for output in job.outputs), job.outputs
    assert ranks(2, "label", folder=folder, settings=settings).succeeded().results[0]["digest"] == unsharded(
        tmp_path, []
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["model.shard=3"], "multiples of 3"),
        (["model.shard=2", "model.name=nowhere"], "model.name=nowhere does not load"),
        (["model.shard=2", "labels.dtype=bfloat16"], "set labels.dtype=model"),
        (["model.shard=2", "search.strategy=gradient_seeded"], "gradient_seeded does not support sharded models"),
    ],
)
def test_unsupported_settings_of_shard_groups_are_refused_on_all_ranks(ranks, tmp_path, settings, says):
    job = ranks(2, "label", folder=str(tmp_path / "labels"), settings=settings)
    assert job.codes == [2, 2] and all(says in output for output in job.outputs), job.outputs


def test_a_batch_that_leaves_processes_idle_is_a_warning(ranks, tmp_path):
    job = ranks(2, "label", folder=str(tmp_path / "labels"), settings=["model.shard=0"]).succeeded()
    assert "set --labels.batch=4" in job.outputs[0]


# ------------------------------------------------------------ features on disk, nodes without a shared disk


def test_cached_features_give_identical_labels(ranks, alone, tmp_path):
    settings, stamps = [f"model.feature_cache={tmp_path}/features"], []
    for name in ("first", "again"):  # filled by both ranks, then read by both
        job = ranks(2, "label", folder=f"{tmp_path}/{name}", settings=settings).succeeded()
        assert {result["digest"] for result in job.results} == {alone}
        assert "feature cache: " in job.outputs[0] and "feature cache: " not in job.outputs[1]
        stamps.append({path.name: path.stat().st_mtime_ns for path in tmp_path.glob("features/*/*/*.safetensors")})
    assert len(stamps[0]) > 1 and stamps[0] == stamps[1]


@pytest.mark.slow
def test_without_a_shared_disk_chunks_are_exchanged(ranks, alone, tmp_path):
    job = ranks(2, "label", folder=str(tmp_path), own_disks=True).succeeded()
    assert [result["digest"] for result in job.results] == [alone, alone]
    assert all(0 < result["made"] < 12 for result in job.results) and sum(r["made"] for r in job.results) == 12
    for lost in [*tmp_path.glob("1/round-0000/chunk-00000[1-4]*"), tmp_path / "1/round-0000/COMMIT.json"]:
        lost.unlink()
    assert ranks(2, "label", folder=str(tmp_path), own_disks=True).succeeded().results[1]["digest"] == alone


def test_work_longer_than_the_timeout_of_collectives_kills_no_rank(ranks):
    job = ranks(2, "uneven", work=9.0).succeeded()
    first, second = job.results[0]["done"]
    assert sorted(first + second) == [0, 1, 2, 3] and [0] in (first, second)
    assert max(result["waited"] for result in job.results) > 6  # waited in the queue for that time
    assert job.results[0]["barrier"] == "failed"  # a collective would have failed
    assert "sent no heartbeat" not in job.outputs[0]


def test_a_long_epoch_is_not_a_hang(ranks):
    """Heartbeats continue while nothing is labelled: a follower that starts before its leader sees it alive."""
    job = ranks(2, "between_rounds", size=2, training=4.0, hangs=False).succeeded()
    assert [result["done"] for result in job.results] == [[[0, 1], [0, 1]]] * 2
    assert not any("sent no heartbeat" in output for output in job.outputs)


def test_a_rank_that_hangs_in_a_round_is_named_and_its_chunk_taken_over(ranks):
    job = ranks(2, "between_rounds", size=1, training=0.0, hangs=True).succeeded()
    assert sorted(job.results[0]["done"][1]) == [0, 1] and len(job.results[1]["done"][1]) == 1
    assert "rank 1 sent no heartbeat" in job.outputs[0]
    assert "rank 0 takes over chunk" in job.outputs[0]


def test_a_dead_rank_is_named_and_its_chunk_taken_over(ranks, alone, tmp_path):
    job = ranks(3, "label", folder=str(tmp_path / "labels"), signal_rank=1)
    assert job.codes == [0, -signal.SIGKILL, 0], job.outputs
    assert job.results[0]["digest"] == alone
    assert "rank 1 sent no heartbeat for 8 s" in job.outputs[0]
    assert any("takes over chunk" in output and "of rank 1" in output for output in job.outputs)


@pytest.mark.slow
def test_a_rank_that_dies_is_named_within_a_minute(ranks, tmp_path):
    """With the default heartbeat; the tests above use shorter timeouts."""
    job = ranks(2, "label", folder=str(tmp_path / "labels"), signal_rank=1, patient=True)
    assert job.codes == [0, -signal.SIGKILL] and "rank 1 sent no heartbeat for 45 s" in job.outputs[0]
    died = float((tmp_path / "labels-died").read_text())
    assert 40 < job.results[0]["named"] - died < 60


def test_killed_ranks_and_a_resume_on_another_number(ranks, alone, tmp_path):
    folder = tmp_path / "labels"
    # rank 0 hosts the queue: the job ends with it
    job = ranks(3, "label", folder=str(folder), signal_rank=0)
    assert job.codes[0] == -signal.SIGKILL and job.codes[1] == job.codes[2] == 2, job.outputs
    assert "lost the connection to rank 0" in job.outputs[1]
    assert 0 < len(chunks(folder)) < 6 and not LabelStore(folder).committed(0)
    resumed = ranks(2, "label", folder=str(folder)).succeeded()
    assert resumed.results[0]["digest"] == alone


def test_sigterm_leaves_a_clean_store(ranks, alone, tmp_path):
    folder = tmp_path / "labels"
    job = ranks(1, "label", folder=str(folder), signal_rank=0, number=signal.SIGTERM, chunks=0)
    assert job.codes == [2] and "stopped during labelling" in job.outputs[0]
    assert not chunks(folder) and not list(folder.rglob("*.tmp*"))
    assert ranks(1, "label", folder=str(folder)).succeeded().results[0]["digest"] == alone


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["model.shard=2"]], ids=["alone", "sharded"])
def test_a_full_disk_stops_the_job_and_leaves_the_store_intact(ranks, tmp_path, settings):
    settings, world = [*SHARDED, *settings], 1 + len(settings)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        job = ranks(world, "label", folder=str(disk / "labels"), settings=settings)
        assert set(job.codes) == {2} and "no space left" in job.outputs[0], job.outputs
        assert "more than is free" in job.outputs[0]  # reported before the work starts
        kept = chunks(disk / "labels")
        assert 0 < len(kept) < 6 and not list(disk.rglob("*.tmp*"))
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        again = ranks(world, "label", folder=str(disk / "labels"), settings=settings).succeeded()
        assert again.results[0]["digest"] == unsharded(tmp_path, [])
    finally:
        subprocess.run(["umount", disk], check=True)


# ------------------------------------------------------------ masks that a compressor proposed


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_proposals_and_priorities_are_the_same_for_any_number_of_ranks(ranks, tmp_path, world):
    (alone,) = ranks(1, "proposals", folder=str(tmp_path / "one")).succeeded().results
    assert len(set(alone["digests"])) == 3 and all(count > 0 for count in alone["usable"][1:])
    job = ranks(world, "proposals", folder=str(tmp_path / "many")).succeeded()
    assert all(result["digests"] == alone["digests"] for result in job.results)


@pytest.mark.slow
def test_a_rank_that_dies_in_an_on_policy_round_changes_no_label(ranks, tmp_path):
    (alone,) = ranks(1, "proposals", folder=str(tmp_path / "one")).succeeded().results
    job = ranks(2, "proposals", folder=str(tmp_path / "many"), signal_rank=1)
    assert job.codes[1] == -signal.SIGKILL and any("takes over chunk" in output for output in job.outputs), job.outputs
    # the next round needs all ranks; a job with another number of ranks resumes from the stored chunks
    (later,) = ranks(1, "proposals", folder=str(tmp_path / "many")).succeeded().results
    assert later["digests"] == alone["digests"]
