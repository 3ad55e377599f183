"""What a drawn page shows, told in sentences that are put together from its questions and answers."""

from collections.abc import Sequence

from vlquant.calib_data.scenes import Question
from vlquant.calib_data.screens import listed

ASKED = "Describe the picture in detail."


def description(kind: str, questions: Sequence[Question]) -> tuple[Question, ...]:
    """The question for a description with its answer, or nothing where the other questions say too little."""
    if kind not in TELLERS:
        return ()
    return (Question(ASKED, TELLERS[kind]({each.text: each.answer for each in questions}), kind, True),)


def tell_document(answers: dict[str, str]) -> str:
    fields = [(asked.removeprefix("What is the ").removesuffix("?"), value) for asked, value in answers.items()]
    told = listed([f"the {label} is {value}" for label, value in fields])
    return (
        "The picture shows a simple document with one field per line. "
        "Each line begins with a blue label on the left, and the value belonging to it is printed in black on the right. "
        f"From its lines one can read that {told}."
    )


def tell_receipt(answers: dict[str, str]) -> str:
    begin = "What is the price of "
    items = [(asked.removeprefix(begin).removesuffix("?"), price) for asked, price in answers.items() if asked.startswith(begin)]
    told = listed([f"{item} for {price}" for item, price in items])
    dearest = max(items, key=lambda pair: float(pair[1]))[0]
    return (
        "This is a receipt: the items stand on the left and their prices on the right, one below the other. "
        f"Among what was bought, there is {told}; of these, {dearest} is the most expensive. "
        f"Below a thin line at the end of the list, the total is given as {answers['What is the total?']}."
    )


def tell_chart(answers: dict[str, str]) -> str:
    begin = "What is the value of bar "
    bars = [(asked.removeprefix(begin).removesuffix("?"), value) for asked, value in answers.items() if asked.startswith(begin)]
    told = listed([f"bar {name} reaches {value}" for name, value in bars])
    tallest, shortest = answers["Which bar is the tallest?"], answers["Which bar is the shortest?"]
    return (
        "The picture is a bar chart with upright bars of one color, each named by a letter below it. "
        "Thin horizontal lines mark the heights 5, 10, 15 and 20. "
        f"The tallest bar is {tallest} and the shortest is {shortest}. Reading off the values, {told}."
    )


TELLERS = {"document": tell_document, "receipt": tell_receipt, "chart": tell_chart}
