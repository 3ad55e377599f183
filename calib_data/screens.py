"""Drawn screens of programs with questions about what they show: for calibration only, the demo model never saw them."""

import random
from dataclasses import dataclass

from vlquant.calib_data import drawing
from vlquant.calib_data.drawing import ADVANCE, CELL, LINE, Box, Picture
from vlquant.calib_data.scenes import Question, Scene

COLUMNS, ROWS = 5, 4
LEFT, RIGHT = 14, COLUMNS * CELL - 14
TITLE_LINE, MENU_LINE, BODY_LINE, BUTTON_LINE = 0.5, 1.6, 3.2, 14.6
"""Vertical centres, counted in lines of text."""
BRIGHT = ("cyan", "orange", "yellow")
"""Colours on which black text is read."""

TITLES = {
    "form": ("Address Book", "New Account", "Booking", "Delivery", "Guest List", "Job Application"),
    "table": ("Files", "Downloads", "Archive", "Backup", "Shared Folder", "Attachments"),
    "settings": ("Settings", "Preferences", "Control Panel", "Options", "My Device", "Profile"),
    "message": ("Mail", "Text Editor", "Calendar", "Photo Viewer", "Web Browser", "Music Player"),
}
MENUS = ("File", "Edit", "View", "Search", "Tools", "Window", "Help", "Insert", "Format")
BUTTONS = {
    "form": (("Save", "Cancel"), ("Send", "Discard"), ("Next", "Back"), ("Submit", "Clear")),
    "table": (("Open", "Delete"), ("Copy", "Rename"), ("Download", "Share"), ("Print", "Close")),
    "settings": (("Apply", "Reset"), ("OK", "Cancel"), ("Save", "Undo"), ("Done", "Defaults")),
    "message": (("Yes", "No"), ("Continue", "Stop"), ("Accept", "Decline"), ("Now", "Later")),
}
FIELDS = {
    "Name": ("Anna Berg", "Tom Fields", "Li Wei", "Maria Costa", "Omar Haddad", "Julia Novak"),
    "City": ("Oslo", "Lisbon", "Chengdu", "Toronto", "Nairobi", "Graz"),
    "Street": ("Mill Lane 4", "Harbour Road 19", "Station Street 7", "Garden Walk 32"),
    "Phone": ("555 0142", "555 0178", "555 0119", "555 0163"),
    "E-mail": ("anna@post.example", "tom@mail.example", "office@shop.example", "info@club.example"),
    "Company": ("North Lights", "Blue Kettle", "Green Wheels", "Old Mill Bakery"),
    "Date": ("12 May 2024", "3 June 2024", "28 August 2025", "1 October 2025"),
    "Guests": ("two adults", "one adult", "a family of four", "three adults"),
    "Language": ("English", "Spanish", "Chinese", "Polish"),
}  # fmt: skip
FILES = (
    "report.pdf", "budget.xlsx", "letter.docx", "holiday.jpg", "notes.txt", "invoice.pdf", "slides.pptx",
    "song.mp3", "map.png", "recipe.txt", "thesis.pdf", "logo.svg", "clip.mp4", "backup.zip",
)  # fmt: skip
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
OPTIONS = (
    "Wi-Fi", "Bluetooth", "Dark mode", "Sound", "Automatic updates", "Night light", "Location",
    "Spell check", "Notifications", "Auto save", "Large text", "Battery saver",
)  # fmt: skip
MESSAGES = (
    ("Save the changes?", "The file was edited 5 minutes ago.", "asks whether to save the changes"),
    ("Delete the three pictures?", "They cannot be restored.", "asks whether to delete three pictures"),
    ("Send without a subject?", "The subject line is empty.", "asks whether to send a mail without a subject"),
    ("Restart the computer?", "An update is ready.", "asks whether to restart the computer"),
    ("Leave this page?", "The form is not complete.", "asks whether to leave the page"),
    ("Move the meeting to Friday?", "Two guests have agreed.", "asks whether to move a meeting to Friday"),
    ("Allow the camera?", "The site wants to take a picture.", "asks whether to allow the use of the camera"),
    ("Buy the album?", "It costs 8.99 with 12 songs.", "asks whether to buy an album for 8.99"),
)


@dataclass(frozen=True)
class Part:
    """Questions about a part of a screen with their answers, and the sentences that describe it."""

    asked: tuple[tuple[str, str], ...]
    sentences: tuple[str, ...]


def screen(chance: random.Random) -> Scene:
    """A window with a title, a menu, buttons, and a form, a table, settings or a message."""
    page = drawing.blank_page(COLUMNS, ROWS, chance)
    kind = chance.choice(list(BODIES))
    parts = (draw_frame(chance, page, kind), BODIES[kind](chance, page), draw_buttons(chance, page, kind))
    asked = [chance.sample(part.asked, min(2, len(part.asked))) for part in parts]
    sentences = " ".join(sentence for part in parts for sentence in part.sentences)
    pairs = [*(pair for of_part in asked for pair in of_part), ("Describe this screen.", sentences)]
    return Scene((page,), tuple(Question(text, answer, "screen", True) for text, answer in pairs))


def draw_frame(chance: random.Random, page: Picture, kind: str) -> Part:
    """Title bar and menu."""
    title, menus = chance.choice(TITLES[kind]), chance.sample(MENUS, 4)
    drawing.draw_bar(page, (0, 0, page.size[0], LINE), chance.choice(BRIGHT))
    drawing.draw_text(page, title, x=LEFT, y=TITLE_LINE * LINE)
    drawing.draw_text(page, "x", x=RIGHT - ADVANCE, y=TITLE_LINE * LINE)
    place = LEFT
    for menu in menus:
        place = drawing.draw_text(page, menu, x=place, y=MENU_LINE * LINE, color="blue")[2] + 2 * ADVANCE
    drawing.draw_line(page, (0, (MENU_LINE + 0.6) * LINE), (page.size[0], (MENU_LINE + 0.6) * LINE))
    asked = (
        ("What is the title of the window?", title),
        (f"Which menu stands to the right of {menus[0]}?", menus[1]),
        ("Which menus are there?", listed(menus)),
    )
    return Part(asked, (f'The screen shows a window titled "{title}" whose menu bar holds {listed(menus)}.',))


def draw_buttons(chance: random.Random, page: Picture, kind: str) -> Part:
    """Two buttons below everything else, one of them in a bright colour."""
    left, right = chance.choice(BUTTONS[kind])
    color, stressed = chance.choice(BRIGHT), chance.choice((left, right))
    for name, start in ((left, 10), (right, 24)):
        box = box_around(start * ADVANCE, BUTTON_LINE, 10)
        if name == stressed:
            drawing.draw_bar(page, box, color)
        outline(page, box)
        drawing.draw_text(page, name, x=box[0] + ADVANCE, y=BUTTON_LINE * LINE)
    asked = (
        ("What does the left button say?", left),
        ("What does the right button say?", right),
        (f"Which button is {color}?", f"The button {stressed} is {color}."),
    )
    return Part(asked, (f"At the bottom there are two buttons, {left} on the left and {right} on the right; {stressed} is {color}.",))


def form(chance: random.Random, page: Picture) -> Part:
    """Labelled fields with what was typed into them."""
    labels, asked, filled = chance.sample(list(FIELDS), chance.randint(3, 5)), [], []
    for label, line in zip(labels, body_lines(2), strict=False):
        value = chance.choice(FIELDS[label])
        drawing.draw_text(page, label, x=LEFT, y=line * LINE)
        outline(page, box_around(11 * ADVANCE, line, 27))
        drawing.draw_text(page, value, x=12 * ADVANCE, y=line * LINE, color="blue")
        asked += [(f"What is in the field {label}?", value), (f'Which field holds "{value}"?', f"The field {label} holds it.")]
        filled.append(f'the field {label} holds "{value}"')
    sentences = (f"It is a form with {len(labels)} fields.", f"From top to bottom, {listed(filled)}.")
    return Part(tuple(asked), sentences)


def table(chance: random.Random, page: Picture) -> Part:
    """Files with their sizes and dates."""
    names = chance.sample(FILES, chance.randint(3, 6))
    sizes = chance.sample(range(12, 980), len(names))
    days = [f"{day} {chance.choice(MONTHS)}" for day in chance.sample(range(1, 29), len(names))]
    asked = [("How many files are listed?", f"There are {len(names)} files.")]
    rows = [("Name", "Size", "Changed"), *zip(names, (f"{size} KB" for size in sizes), days, strict=True)]
    for index, (row, line) in enumerate(zip(rows, body_lines(1.5), strict=False)):
        for text, start in zip(row, (1, 17, 28), strict=True):
            drawing.draw_text(page, text, x=start * ADVANCE, y=line * LINE, color="black" if index else "purple")
        drawing.draw_line(page, (LEFT, (line + 0.7) * LINE), (RIGHT, (line + 0.7) * LINE))
    for name, size, day in rows[1:]:
        asked += [(f"How large is {name}?", size), (f"Which file was changed on {day}?", name)]
    largest, smallest = (names[sizes.index(pick(sizes))] for pick in (max, min))
    sentences = (
        f"A table lists {len(names)} files with name, size and date of the last change: {listed(names)}.",
        f"The largest of them is {largest} with {max(sizes)} KB, and the smallest is {smallest} with {min(sizes)} KB.",
    )
    return Part(tuple(asked), sentences)


def settings(chance: random.Random, page: Picture) -> Part:
    """Options that are on (a green circle) or off (a black one)."""
    names = chance.sample(OPTIONS, chance.randint(4, 6))
    states = dict(zip(names, [True, False, *(chance.random() < 0.5 for _ in names[2:])], strict=True))
    chance.shuffle(names)
    asked = []
    for name, line in zip(names, body_lines(1.8), strict=False):
        on = states[name]
        drawing.draw_text(page, name, x=LEFT, y=line * LINE)
        drawing.draw_figure(page, "circle", "green" if on else "black", center=(27 * ADVANCE, line * LINE), radius=9)
        drawing.draw_text(page, "On" if on else "Off", x=29 * ADVANCE, y=line * LINE)
        asked.append((f"Is {name} switched on?", f"Yes, {name} is on." if on else f"No, {name} is off."))
    on, off = ([name for name in names if states[name] is state] for state in (True, False))
    asked += [("Which settings are on?", listed(on)), ("Which settings are off?", listed(off))]
    sentences = (
        f"It lists {len(names)} settings, each with a circle that is green for on and black for off.",
        f"Switched on: {listed(on)}; switched off: {listed(off)}.",
    )
    return Part(tuple(asked), sentences)


def message(chance: random.Random, page: Picture) -> Part:
    """A box in the middle that asks for a decision."""
    question, reason, meaning = chance.choice(MESSAGES)
    color = chance.choice(("red", "purple", "green"))
    outline(page, (ADVANCE, 4 * LINE, page.size[0] - ADVANCE, 10 * LINE))
    drawing.draw_text(page, question, x=3 * ADVANCE, y=5.5 * LINE, color=color)
    drawing.draw_text(page, reason, x=3 * ADVANCE, y=8 * LINE)
    asked = (
        ("What does the message ask?", question),
        ("What does the line below the question say?", reason),
        (f"Which text is {color}?", question),
    )
    return Part(asked, (f"A box in the middle {meaning}.", f'Below the question, which is {color}, it says: "{reason}"'))


BODIES = {"form": form, "table": table, "settings": settings, "message": message}


def body_lines(step: float) -> list[float]:
    """Vertical centres between menu and buttons, in lines of text."""
    return [BODY_LINE + step * index for index in range(int((BUTTON_LINE - 1.5 - BODY_LINE) / step) + 1)]


def box_around(x: float, line: float, length: int) -> Box:
    """The box of a button or field for so many symbols."""
    return (x, (line - 0.65) * LINE, x + length * ADVANCE, (line + 0.65) * LINE)


def outline(page: Picture, box: Box) -> None:
    """The sides of a box."""
    left, top, right, bottom = box
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    for index, corner in enumerate(corners):
        drawing.draw_line(page, corners[index - 1], corner)


def listed(names: list[str]) -> str:
    """A, B and C."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
