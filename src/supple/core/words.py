"""Format counts and numbers for messages and tables."""


def in_words(count: int) -> str:
    """Format a number of workers: "1 worker", "2 workers"."""
    return "1 worker" if count == 1 else f"{count} workers"


def epoch_in_words(epoch: int, num_epochs: int) -> str:
    """Format an epoch, given from 0: "epoch 2/4", and "epoch 4/4" when all are done."""
    return f"epoch {min(epoch + 1, num_epochs)}/{num_epochs}"


def in_digits(number: float) -> str:
    """Format with three digits: "0.00234", "12.3", "4,560"."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def accelerator_hours(number: str) -> str:
    """Add the unit to a formatted number: "1 accelerator-hour"."""
    return f"{number} accelerator-hour{'s' * (number != '1')}"
