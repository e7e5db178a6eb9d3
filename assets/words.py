"""Word lists of the instruction generator, and made-up words that can be copied but not remembered."""

from __future__ import annotations

from random import Random


def _split(words: str) -> list[str]:
    return words.split()


NAMES = _split(
    "Ada Amir Anna Anton Bela Ben Bruno Carla Clara Dan Daria Dora Edgar Elena Elsa Emil Enid Esther "
    "Farid Felix Fiona Frida Gina Greta Hana Hector Henry Hugo Ida Igor Irene Ivan Jana Jasper Joel "
    "Jonas Julia Karim Kira Lars Laura Leo Lina Lucy Magda Marco Maria Max Mira Nadia Nell Nora Omar "
    "Oscar Otto Paula Peter Petra Quinn Rana Rosa Ruben Ruth Sam Sara Selma Simon Sofia Stefan Tara "
    "Theo Tom Ugo Vera Viktor Walter Wanda Yara Yusuf Zoe"
)

CATEGORIES = {
    "animal": _split(
        "horse goat rabbit tiger monkey bear fox wolf camel donkey sheep mouse lion deer otter badger"
    ),
    "bird": _split("owl robin swan hawk crow sparrow goose heron parrot eagle pigeon swallow"),
    "fruit": _split("plum cherry grape melon fig pear peach mango banana raspberry"),
    "tool": _split("hammer saw chisel spade rake drill shovel pliers axe wrench"),
    "vehicle": _split("wagon tram bus lorry bicycle canoe ferry tractor train carriage"),
    "instrument": _split("violin flute drum trumpet harp guitar cello organ whistle banjo"),
    "clothing": _split("coat scarf hat glove shirt apron boot sock belt skirt"),
    "tree": _split("oak birch willow elm maple cedar pine beech"),
    "job": _split("baker tailor sailor farmer miller teacher doctor hunter painter smith soldier cook"),
    "metal": _split("iron copper silver tin lead gold brass steel"),
}
COLOURS = _split("red blue green yellow white black brown purple pink grey orange golden")
ADJECTIVES = _split(
    "old tiny heavy bright quiet broken clean strange round soft wooden lost cheap pretty rough"
)
PLACES = _split(
    "forest market harbour village castle river mountain school island valley bridge meadow town cave"
)
TOWNS = _split(
    "Bramford Ostley Kelvin Marsh Dunmere Tollgate Hexby Larkhill Wexcombe Norwold Saltby Grimsted"
)
OPPOSITES = {
    "big": "small",
    "hot": "cold",
    "happy": "sad",
    "fast": "slow",
    "early": "late",
    "rich": "poor",
    "young": "old",
    "strong": "weak",
    "wet": "dry",
    "loud": "quiet",
    "hard": "soft",
    "long": "short",
    "full": "empty",
    "clean": "dirty",
    "brave": "timid",
    "near": "far",
    "high": "low",
    "thick": "thin",
    "wide": "narrow",
    "sweet": "bitter",
}
IRREGULAR_PAST = {
    "run": "ran",
    "sing": "sang",
    "give": "gave",
    "eat": "ate",
    "write": "wrote",
    "drink": "drank",
    "see": "saw",
    "speak": "spoke",
    "take": "took",
    "fall": "fell",
    "ride": "rode",
    "find": "found",
    "bring": "brought",
    "catch": "caught",
    "sleep": "slept",
    "swim": "swam",
}
CARRY_VERBS = _split("carried found lost sold painted hid washed mended dropped bought kept stole")
FEELINGS = {
    "joy": (
        "What a wonderful morning, I could sing",
        "I laughed until my sides hurt",
        "This is the best present ever",
        "We danced all night and I loved it",
        "My heart is light and warm",
        "At last my dream came true",
    ),
    "anger": (
        "How dare you break my window",
        "I will not stand for this any longer",
        "Stop shouting at me at once",
        "That rude man makes me furious",
        "You lied to me again",
        "I slammed the gate and stamped my foot",
    ),
    "fear": (
        "Something is moving in the dark",
        "I dare not open my eyes",
        "My knees shook when the howling began",
        "Please do not leave me here alone",
        "I hid and trembled under the bed",
        "The ice is cracking beneath us",
    ),
    "sorrow": (
        "I wept when the old dog died",
        "Nobody came to say goodbye",
        "I miss my brother so much",
        "All our hopes are gone",
        "She sat alone with tears on her cheeks",
        "It will never be the same without her",
    ),
}
WEATHER = {
    "rain": (
        "Drops ran down the glass all afternoon",
        "Take an umbrella, the streets are soaked",
        "Puddles are everywhere",
        "It has been pouring since breakfast",
    ),
    "snow": (
        "White flakes covered the hills",
        "The children built a man with a carrot nose",
        "We took the sledge to the slope",
        "Everything lay under a soft white blanket",
    ),
    "wind": (
        "My hat blew away",
        "The trees bent and the shutters banged",
        "The kite flew higher and higher",
        "A great gust tore the sails",
    ),
    "sun": (
        "Not a cloud was in the sky",
        "We sat in the shade to cool down",
        "It was so hot that the tar melted",
        "The bright sky hurt our eyes",
    ),
}
PRAISE = _split("lovely splendid delightful charming excellent clever thrilling tender superb moving")
BLAME = _split("dull clumsy boring awful tedious silly dreadful lifeless weak messy")
WORKS = _split("book play song tale poem film picture concert dance show")

_UNITS = _split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

_ONSETS = _split("b br c ch cl d dr f fl g gr h j k l m n p pl pr qu r s sh sk sl st t th tr v w y z")
_NUCLEI = _split("a e i o u a e i o ai ea ee oo ou")
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "ck", "nd", "st", "x", "p"]


def number_in_words(number: int) -> str:
    """Spells a number from 0 to 99, such as `forty-two`."""
    assert 0 <= number <= 99, number
    if number < 20:
        return _UNITS[number]
    tens, unit = divmod(number, 10)
    return f"{_TENS[tens]}-{_UNITS[unit]}" if unit else _TENS[tens]


def made_up_word(rng: Random) -> str:
    """Returns a pronounceable word of one to three syllables that hardly any text contains."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS)
        for _ in range(rng.choice((1, 2, 2, 3)))
    )


def any_noun(rng: Random) -> str:
    """Returns a concrete noun of any category."""
    return rng.choice(CATEGORIES[rng.choice(tuple(CATEGORIES))])


def any_word(rng: Random) -> str:
    """Returns a common word (two times in three) or a made-up one."""
    if rng.random() < 0.34:
        return made_up_word(rng)
    return rng.choice((any_noun, lambda r: r.choice(COLOURS), lambda r: r.choice(ADJECTIVES)))(rng)


def article(word: str) -> str:
    """Puts `a` or `an` before a word, by its first letter."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
