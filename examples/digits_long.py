"""The digits job for as long as a demonstration needs: the same training, more epochs."""

import digits

import supple

digits.EPOCHS = 400


def train(job: supple.Job) -> None:
    digits.train(job)


if __name__ == "__main__":
    supple.run(train)
