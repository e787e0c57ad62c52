"""What the training thread does, as others see and hold it."""

import threading
import time

from supple.train.generation.activity import Activity


def test_it_tells_for_how_long_the_last_thing_has_been_done() -> None:
    before = time.monotonic()
    activity = Activity()
    assert activity.doing == "starting"
    activity.enter("data")
    between = time.monotonic()
    doing, for_s = activity.report
    assert doing == "data"
    assert 0.0 <= for_s <= time.monotonic() - before
    assert activity.report[1] >= 0.0
    assert activity.report[1] - for_s <= time.monotonic() - between


def test_what_is_held_does_not_change_until_it_is_let_go() -> None:
    activity = Activity()
    activity.enter("data")
    asked, entered = threading.Event(), threading.Event()

    def goes_on() -> None:
        asked.set()
        activity.enter("script")
        entered.set()

    with activity.held() as doing:
        thread = threading.Thread(target=goes_on)
        thread.start()
        asked.wait()
        assert (doing, activity.doing) == ("data", "data")
        assert not entered.is_set()
    thread.join()
    assert activity.doing == "script"
