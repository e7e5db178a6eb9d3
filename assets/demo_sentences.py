"""The sentences of the three demo tasks: each function draws one input text and its right answer."""

from __future__ import annotations

import json
from random import Random

DEPARTMENTS = ("billing", "delivery", "returns", "technical", "account", "sales")
ROOMS = ("kitchen", "bedroom", "hall", "study", "bathroom", "garage")
DISHES = ("soup", "salad", "pizza", "pancakes", "noodles", "burger", "lasagne", "sandwich")
SIZES = ("small", "medium", "large")
DRINKS = ("coffee", "lemonade", "milk", "water", "juice", "cocoa")
BRIGHTNESS = ("low", "half", "full")
HEATING_MODES = ("eco", "normal", "turbo")

_ORDERED = (
    "keyboard",
    "kettle",
    "toaster",
    "headset",
    "webcam",
    "lawnmower",
    "monitor",
    "backpack",
    "blender",
)
_OPENINGS = (
    "Hello, ",
    "Hi there, ",
    "Good day. ",
    "Dear team, ",
    "Sorry to bother you, but ",
    "",
    "",
    "",
    "",
)
_CLOSINGS = ("", "", "", " Thanks.", " Please reply soon.", " Can you help?", " Regards, {initial}.")

_MESSAGES = {
    "billing": (
        "my invoice for the {thing} shows the wrong amount.",
        "I was charged twice for order {number}.",
        "why is there an extra fee of {small} euros on my bill?",
        "the payment for the {thing} was taken two times from my card.",
        "please send me the invoice for order {number} again.",
        "your bill says {small} euros but the price was lower.",
        "my credit card was charged for a {thing} I never bought.",
        "I need a receipt with the tax for order {number}.",
    ),
    "delivery": (
        "my parcel with the {thing} has not arrived yet.",
        "where is the courier with order {number}?",
        "the tracking page of order {number} has not moved for {small} days.",
        "the driver left the {thing} at the wrong address.",
        "can the parcel come {small} days later? I am away.",
        "order {number} was shipped to my old street.",
        "when will the {thing} be shipped to me?",
        "the courier says order {number} is lost.",
    ),
    "returns": (
        "I want to send the {thing} back and get a refund.",
        "how do I return order {number}?",
        "the {thing} is too small, may I exchange it?",
        "I sent the {thing} back {small} days ago and wait for my refund.",
        "please give me a return label for order {number}.",
        "the {thing} is not what I wanted, I would like to exchange it.",
        "is it too late to return a {thing} after {small} days?",
        "I changed my mind about the {thing} and want my refund.",
    ),
    "technical": (
        "the {thing} does not switch on any more.",
        "my {thing} shows error {number} and stops.",
        "after the update the {thing} crashes every {small} minutes.",
        "the {thing} makes a buzzing noise and gets very hot.",
        "how do I connect the {thing} to my computer?",
        "the {thing} stopped working, error {number} blinks.",
        "the app freezes when I connect my {thing}.",
        "the new update of the {thing} will not install.",
    ),
    "account": (
        "I forgot my password and cannot log in.",
        "please change the email address of my profile {number}.",
        "my login is locked after {small} wrong passwords.",
        "how can I delete my profile {number}?",
        "I cannot log in since I changed my password {small} days ago.",
        "the reset code for my password never came to user {number}.",
        "someone else uses my login, user {number}.",
        "I want a new user name instead of user {number}.",
    ),
    "sales": (
        "do you give a discount if we buy {small} of the {thing}?",
        "is the {thing} in stock in another colour?",
        "I would like a quote for {small} pieces of the {thing}.",
        "which {thing} do you recommend for a small office?",
        "we are thinking of buying {small} of your {thing}, is there an offer?",
        "when will the {thing} be in stock again?",
        "does the {thing} come with a bigger model, and at which price?",
        "can our school get a quote for {small} of the {thing}?",
    ),
}

_ORDERS = (
    "I will have the {dish}, {size}, and a {drink}.",
    "One {size} {dish} please, and a {drink} to drink.",
    "A {drink} and a {size} {dish} for me.",
    "Could we get the {size} {dish} with a {drink}?",
    "Bring me a {drink} first, then the {dish}, the {size} one.",
    "My son wants the {dish} in {size}, with {drink}.",
    "Just a {dish}, make it {size}, plus a {drink}.",
    "For table {table}: {dish}, {size}, and {drink}.",
    "Table {table} would like a {drink} and the {size} {dish}.",
    "She takes the {size} {dish}, he only wants a {drink}.",
    "The {dish}, please, a {size} portion, and {drink}.",
    "To drink a {drink}, to eat a {size} {dish}.",
)


def support_message(rng: Random) -> tuple[str, str]:
    """Returns a customer's message and the department that should answer it."""
    department = rng.choice(DEPARTMENTS)
    text = rng.choice(_MESSAGES[department]).format(
        thing=rng.choice(_ORDERED), number=rng.randint(1000, 9999), small=rng.randint(3, 30)
    )
    opening = rng.choice(_OPENINGS)
    closing = rng.choice(_CLOSINGS).format(initial=rng.choice("ABCDEFGHKLMNPRST"))
    starts_sentence = not opening or opening.endswith(". ")
    return opening + (text[0].upper() + text[1:] if starts_sentence else text) + closing, department


def cafe_order(rng: Random) -> tuple[str, str]:
    """Returns an order in a sentence and its JSON object with `dish`, `size` and `drink`."""
    order = {"dish": rng.choice(DISHES), "size": rng.choice(SIZES), "drink": rng.choice(DRINKS)}
    text = rng.choice(_ORDERS).format(**order, table=rng.randint(1, 40))
    return text, json.dumps(order)


def home_wish(rng: Random) -> tuple[str, str]:
    """Returns a wish about a device of the house and its command line."""
    room = rng.choice(ROOMS)
    level, mode = rng.choice(BRIGHTNESS), rng.choice(HEATING_MODES)
    wish, command = rng.choice(
        (
            ("switch on the lamp {in_room}", "light.{room} on"),
            ("make it dark {in_room}", "light.{room} off"),
            ("dim the lamp {in_room} to {level}", "light.{room} on level={level}"),
            ("set the lamp {in_room} at {level} power", "light.{room} on level={level}"),
            ("put the heating {in_room} on {mode}", "heat.{room} on mode={mode}"),
            ("I want {mode} heating {in_room}", "heat.{room} on mode={mode}"),
            ("no more heating {in_room}", "heat.{room} off"),
            ("pull up the blinds {in_room}", "blind.{room} open"),
            ("let the blinds down {in_room}", "blind.{room} close"),
            ("start the fan {in_room}", "fan.{room} on"),
            ("run the fan {in_room} at {level} speed", "fan.{room} on level={level}"),
            ("stop the fan {in_room}", "fan.{room} off"),
        )
    )
    slots = {"in_room": f"in the {room}", "room": room, "level": level, "mode": mode}
    polite = rng.choice(
        (
            "{}",
            "please {}",
            "{} please",
            "could you {}",
            "{} now",
            "hey house, {}",
            "I am cold, {}",
            "before I go, {}",
            "{}, will you",
            "{} for the night",
            "{} for me",
            "kindly {}",
        )
    )
    return polite.format(wish.format(**slots)), command.format(**slots)
