"""What a script prints, as lines for the screen: bars do not flood it, and nothing is lost."""

import io
import logging
import threading

import pytest

from supple.train.start.output import Output, Stream


class Screen:
    """One stream of an output whose clock is set by hand."""

    def __init__(self) -> None:
        self.time = 100.0
        self.log = io.StringIO()
        self.output = Output(now=lambda: self.time)
        self.prefix: str | None = ""
        self.stream = self.made()

    def made(self) -> Stream:
        return self.output.stream(self.log, lambda: self.prefix)

    def take(self, **how: bool) -> list[str]:
        return list(self.output.take(**how))


class Bar:
    """Writes what tqdm writes, at a position below other bars."""

    def __init__(self, stream: Stream, total: int, position: int = 0) -> None:
        self.stream, self.total, self.position = stream, total, position
        self.done = -1
        self.update()

    def update(self) -> None:
        self.done += 1
        self._at_position(f"\r{self.done}/{self.total}|##  |  ")

    def write(self, text: str) -> None:
        self._at_position("\r            \r")
        print(text, file=self.stream)
        self._at_position(f"\r{self.done}/{self.total}|##  |  ")

    def close(self) -> None:
        self._at_position("\r            \r" if self.position else "\n")

    def _at_position(self, text: str) -> None:
        if self.position:
            self.stream.write("\n" * self.position)
        self.stream.write(text)
        if self.position:
            self.stream.write("\x1b[A" * self.position)


def test_whole_lines_are_shown_in_order_and_the_log_has_every_byte() -> None:
    screen = Screen()
    print("a", "b", file=screen.stream)
    screen.stream.write("c")
    assert screen.take() == ["a b"]
    screen.stream.write("d\n\ne\r\nf")
    assert screen.take() == ["cd", "", "e"]
    assert screen.log.getvalue() == "a b\ncd\n\ne\r\nf"


def test_a_progress_bar_is_a_line_every_few_seconds_and_its_last_state_at_the_end() -> None:
    screen = Screen()
    shown: list[str] = []
    for number in range(100):
        screen.stream.write(f"\r{number}%|bar|   ")
        shown += screen.take()
        screen.time += 0.125
    assert shown == ["0%|bar|", "40%|bar|", "80%|bar|"]
    screen.stream.write("\r100%|bar|\n")
    assert screen.take() == [], "2.5 s after the line before"
    screen.time += 2.5
    assert screen.take() == ["100%|bar|"]
    screen.stream.write("\rnext 1%")
    assert screen.take() == []
    assert screen.take(is_end=True) == ["next 1%"]
    assert screen.take(is_end=True) == []


def test_a_bar_that_ends_each_text_with_a_carriage_return_is_one_too() -> None:
    screen = Screen()
    for number in range(10):
        screen.stream.write(f"step {number}\r")
    assert screen.take() == ["step 9"]
    screen.stream.write("\n")
    assert screen.take() == [] and screen.take(is_end=True) == ["step 9"]


@pytest.mark.parametrize("tell", ["log", "print", "tqdm"])
def test_a_line_printed_in_the_middle_of_a_bar_has_a_line_of_its_own(tell: str) -> None:
    screen = Screen()
    handler = logging.StreamHandler(screen.stream)
    record = logging.LogRecord("x", logging.INFO, "x", 1, "half way", (), None)
    bar = Bar(screen.stream, 10)
    screen.take()
    for number in range(10):
        bar.update()
        if number == 5 and tell == "log":
            handler.emit(record)
        elif number == 5 and tell == "print":
            print("half way", file=screen.stream)
        elif number == 5:
            bar.write("half way")
    bar.close()
    assert screen.take() == ["half way"]
    assert screen.take(is_end=True) == ["10/10|##  |"]


def test_nested_bars_do_not_flood_and_leave_no_escape_sequences() -> None:
    screen = Screen()
    outer = Bar(screen.stream, 20)
    for _ in range(20):
        inner = Bar(screen.stream, 20, position=1)
        for _ in range(20):
            inner.update()
        inner.close()
        outer.update()
    outer.close()
    shown = screen.take() + screen.take(is_end=True)
    assert len(shown) <= 2 and "\x1b" in screen.log.getvalue()
    assert not any("\x1b" in line or "\r" in line for line in shown)


def test_colours_and_bells_are_for_the_log() -> None:
    screen = Screen()
    screen.stream.write("\x1b[1;31mred\x1b[0m\a\ttab\n\x1b[K\n")
    assert screen.take() == ["red\ttab"]


def test_two_streams_do_not_mix_their_lines_and_each_has_a_bar() -> None:
    screen = Screen()
    other = screen.made()
    screen.stream.write("out")
    other.write("\rbar 1%")
    screen.stream.write("put\n\rbar 2%")
    assert screen.take() == ["output", "bar 2%", "bar 1%"]


def test_lines_are_behind_the_prefix_of_their_time_or_not_shown() -> None:
    screen = Screen()
    screen.prefix = None
    print("before", file=screen.stream)
    screen.stream.write("\rbar before")
    assert screen.take(is_end=True) == []
    screen.prefix = "[rank 1] "
    print("now", file=screen.stream)
    assert screen.take() == ["[rank 1] now"]


def test_a_line_without_an_end_is_cut_and_not_kept_for_ever() -> None:
    screen = Screen()
    for _ in range(20):
        screen.stream.write("x" * 10_000)
    assert [len(line) for line in screen.take()] == [70_000, 70_000]


def test_threads_lose_no_line() -> None:
    screen = Screen()

    def write(name: int) -> None:
        for number in range(200):
            screen.stream.write(f"{name}.{number}\n")

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(screen.take()) == sorted(f"{a}.{b}" for a in range(4) for b in range(200))
