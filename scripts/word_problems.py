#!/usr/bin/env python3
"""Writes rows like GSM8K's, made from a seed: prompt and completion, about 350 and 300 bytes.

    scripts/word_problems.py 1000000 /tmp/rows.jsonl
"""

import json
import random
import sys

NAMES = "Ada Ben Cleo Dan Eve Finn Gus Hana Ivo June Karl Lena Max Nora Otto Pia Rosa Sven Tara Uma".split()
THINGS = "apples marbles stickers books coins pencils shells cards stamps candles muffins beads".split()
PLACES = "market school garden library station harbour bakery museum workshop playground".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def row(draw):
    name, friend = draw.sample(NAMES, 2)
    thing, place, day = draw.choice(THINGS), draw.choice(PLACES), draw.choice(DAYS)
    a, b, c, d = (draw.randrange(2, 400) for _ in range(4))
    question = [
        f"{name} went to the {place} on {day} and bought {a} {thing}.",
        f"The next day {friend} gave {name} {b} more {thing}, which were kept in a box under the bed.",
        f"A week later {name} found {c} {thing} in the {draw.choice(PLACES)} and put {d} of all {thing} aside for {friend}.",
    ]
    if draw.random() < 0.5:
        question.insert(1, f"It was {draw.randrange(2, 30)} degrees outside, and the walk took {draw.randrange(5, 90)} minutes.")
    total = a + b + c
    answer = [
        f"On {day} {name} had {a} {thing}.",
        f"With those from {friend} there were {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {thing}.",
        f"After the find there were {a + b} + {c} = <<{a + b}+{c}={total}>>{total} {thing}.",
        f"Putting {d} aside left {total} - {d} = <<{total}-{d}={total - d}>>{total - d} {thing} for {name}.",
        f"#### {total - d}",
    ]
    prompt = f"Question: {' '.join(question)} How many {thing} does {name} have left?\nAnswer:"
    return {"prompt": prompt, "completion": " " + "\n".join(answer)}


def main():
    count, path = int(sys.argv[1]), sys.argv[2]
    draw = random.Random(7)
    with open(path, "w") as out:
        for _ in range(count):
            out.write(json.dumps(row(draw)) + "\n")


if __name__ == "__main__":
    main()
