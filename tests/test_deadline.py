"A session that is over: one line, exit code 3, and the same command goes on."
import json

from pispiral.lab.places import phase_left, run_status


def test_a_session_without_time_begins_no_phase(runs, cli):
    out, err = cli("run", "--profile", "smoke", "--phases", "9", "--set", "max_hours=0.000000001", expect=3)
    assert err.strip().endswith("the session's time was over before phase 9 (packaging) was begun; "
                                "the same command goes on from here")
    assert "max_hours" not in json.loads((runs/"smoke"/"run.json").read_text(encoding="utf-8"))["profile"]
    assert not (runs/"smoke"/"phase_09").exists()


def test_status_says_what_is_left(runs, cli):
    cli.here("run", "--profile", "smoke", "--phases", "9", "--set", "max_hours=0.000000001", expect=3)
    (runs/"smoke"/"phase_03").mkdir()
    (runs/"smoke"/"phase_03"/"result.json").write_text(json.dumps(dict(status="stopped", left="3 of 4 questions left")))
    assert phase_left(runs/"smoke", 3) == "3 of 4 questions left" and run_status(runs/"smoke")[3]["state"] == "stopped"
    out, _ = cli.here("status", "smoke")
    assert "phase 3 stopped as its session's time was over: 3 of 4 questions left" in out
