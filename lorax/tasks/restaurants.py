"""Data-to-text that ships with the package: a meaning representation -> English sentences.

In the spirit of the E2E challenge (arXiv 1706.09254), from a grammar of our own:

    name = The Golden Fern ; kind = cafe ; price = cheap ; rating = low ; near = Old Mill =>
    Near the Old Mill, there is a cheap cafe called The Golden Fern. It has few fans.

A slot's words depend on its value, on the slots next to it (a low rating is worded differently for
a cheap place than for an expensive one; praise after a complaint gets a "but") and on its position:
before the noun, after it, as a verb, or as a clause of its own. Words are kept simple, so
that a small vocabulary spells them in few tokens.
"""

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lorax.tasks.data import Data, pairs
from lorax.tasks.rows import linearise

N_TRAIN, N_EVAL, N_TEST = 12_000, 512, 512
MEANINGS = 4_000  # distinct meaning representations among 12,000 train examples: three texts each
HELD_OUT = 8  # one in 8 meaning representations is for evaluation only

# ---------------------------------------------------------------------------------- vocabulary

ADJECTIVES = (
    *("Golden", "Red", "Green", "Blue", "Old", "Little", "Happy", "Silver", "Hungry", "Sleepy"),
    *("Brave", "Lucky", "White", "Black", "Merry", "Tall", "Secret", "Sunny"),
)
NOUNS = (
    *("Fern", "Fox", "Bear", "Lion", "Rose", "Bell", "Moon", "Star", "Apple", "Duck", "Crown"),
    *("Horse", "Owl", "Ship", "Tree", "Cup", "Cat", "Bird", "Fish", "Pear"),
)
COOKS = {  # name -> possessive
    **dict.fromkeys(("Anna", "Lucy", "Mary", "Rose", "Sara", "Lily", "Mia", "Jane"), "her"),
    **dict.fromkeys(("Ben", "Tom", "Jack", "Max", "Sam", "Tim", "John", "Peter"), "his"),
}
HOUSES = ("Kitchen", "Table", "Corner", "House", "Garden", "Place")
FOODS = {  # food -> (taste, staple)
    "Thai": ("spicy", "noodles"),
    "Italian": ("rich", "pasta"),
    "Indian": ("hot", "rice"),
    "French": ("fine", "cheese"),
    "Mexican": ("bold", "beans"),
    "Greek": ("fresh", "salad"),
    "Chinese": ("tasty", "dumplings"),
    "English": ("plain", "pies"),
    "Irish": ("hearty", "stew"),
    "Turkish": ("smoky", "meat"),
    "Japanese": ("light", "fish"),
    "American": ("filling", "burgers"),
}
DISHES = (
    *("apple pie", "cherry pie", "meat pie", "lemon cake", "carrot cake", "plum cake", "fish soup"),
    *("bean soup", "egg soup", "onion soup", "roast duck", "roast beef", "ice cream", "corn bread"),
    *("pancakes", "meatballs", "egg rolls", "onion rings", "butter cookies", "baked apples"),
)
SIGHTS = tuple(
    f"{adjective} {noun}"
    for adjective in ("Old", "Red", "Stone", "Little", "Long", "White")
    for noun in ("Mill", "Bridge", "Church", "School", "Tower", "Barn", "Gate")
)
VALUES = {  # slot -> its values, in the order of a prompt; a name is put together by `_meaning`
    "kind": ("cafe", "pub", "diner", "inn", "bakery", "tea room", "grill"),
    "food": tuple(FOODS),
    "dish": DISHES,
    "cook": tuple(COOKS),
    "price": ("cheap", "fair", "high"),
    "rating": ("low", "okay", "high"),
    "area": ("river", "sea", "hill", "woods", "city", "market", "park", "station"),
    "near": SIGHTS,
    "open": ("early", "late", "always", "weekend", "summer"),
    "mood": ("quiet", "loud", "cozy", "plain", "fancy"),
    "kids": ("yes", "no"),
    "pets": ("yes", "no"),
    "dress": ("smart", "any"),
}
LIKELY = {"kind": 3.0, "food": 2.0, "price": 2.0, "rating": 2.0}  # the others: 1
OPEN = {"food", "dish", "cook", "near"}  # slots whose value is spelled out, not reworded

# ------------------------------------------------------------------------------------- phrases


class Forms(NamedTuple):
    """Ways to say one thing, the usual ones first."""

    sign: int  # 1 praise, -1 complaint, 0 neither
    adj: tuple[str, ...]  # before the noun: "a {adj} cafe"
    post: tuple[str, ...]  # after it: "a cafe {post}"
    verb: tuple[str, ...]  # after a subject: "It {verb}"
    say: tuple[str, ...]  # a clause of its own


def _forms(sign: int, adj: str = "", post: str = "", verb: str = "", say: str = "") -> Forms:
    return Forms(sign, *(tuple(x.split(" | ")) if x else () for x in (adj, post, verb, say)))


# Keys are "slot=value", or "slot" where the value is open. {braces} are filled by `_fields`.
FORMS = {
    "food": _forms(
        0,
        adj="{food}",
        verb="serves {taste} {food} food | makes {food} food like {staple}"
        " | is the place to go for {food} {staple}",
        say="the food is {food} and {taste} | {food} {staple} {is_staple} served there"
        " | you can eat {taste} {food} food there",
    ),
    "dish": _forms(
        1,
        verb="is known for its {dish} | is proud of its {dish}",
        say="the {dish} {is_dish} very good | you should try the {dish}"
        " | people come for the {dish} | the {dish} {is_dish} the best thing there",
    ),
    "cook": _forms(
        0,
        verb="is run by {cook} | has a cook called {cook}",
        say="{cook} is the cook | the food is cooked by {cook} | {cook} likes to meet {her} guests",
    ),
    "price=cheap": _forms(
        1,
        adj="cheap | low-cost",
        verb="is cheap | does not cost much | has low prices",
        say="you will not pay much | the prices are low | a meal costs only a few coins",
    ),
    "price=fair": _forms(
        0,
        adj="fairly priced",
        verb="has fair prices | is neither cheap nor costly",
        say="you pay a fair price there | the prices are fair",
    ),
    "price=high": _forms(
        -1,
        adj="expensive | costly",
        verb="is expensive | is not cheap | costs a lot",
        say="the prices are high | a meal costs a lot of money | you need a full purse",
    ),
    "rating=low": _forms(
        -1,
        adj="badly rated | unloved",
        verb="is not well liked | gets bad marks | has few fans",
        say="guests do not like it | people say it is bad | few guests come back",
    ),
    "rating=okay": _forms(
        0,
        adj="so-so | ordinary",
        verb="is just okay | gets mixed marks | is neither good nor bad",
        say="people say it is okay | not all guests like it",
    ),
    "rating=high": _forms(
        1,
        adj="much loved | excellent | top-rated",
        verb="is much loved | gets top marks | has many happy guests",
        say="guests love it | people say it is the best | almost every guest comes back",
    ),
    "area=river": _forms(
        0,
        post="by the river | on the river bank",
        verb="is by the river | looks out over the river",
        say="the river runs past its door",
    ),
    "area=sea": _forms(
        0,
        post="by the sea | on the beach",
        verb="is on the beach | looks out over the sea",
        say="you can hear the waves from there",
    ),
    "area=hill": _forms(
        0,
        post="on the hill | on top of the hill",
        verb="sits on top of the hill | is up on the hill",
        say="you have to climb the hill to get there",
    ),
    "area=woods": _forms(
        0,
        post="in the woods | at the edge of the forest",
        verb="hides in the woods | is at the edge of the forest",
        say="tall trees grow all around it",
    ),
    "area=city": _forms(
        0,
        post="in the city | in the middle of town",
        verb="is in the city | is in the middle of town",
        say="you will find it in the busy streets of the city",
    ),
    "area=market": _forms(
        0,
        post="on the market square | at the market",
        verb="is on the market square | looks out on the market",
        say="the market is right outside",
    ),
    "area=park": _forms(
        0,
        post="in the park | beside the park",
        verb="is in the park | is right beside the park",
        say="you walk through the park to get there",
    ),
    "area=station": _forms(
        0,
        post="at the station | by the train tracks",
        verb="is at the station | stands by the train tracks",
        say="the trains stop right outside",
    ),
    "near": _forms(
        0,
        post="near the {near} | close to the {near} | not far from the {near}",
        verb="is near the {near} | is a short walk from the {near}",
        say="the {near} is close by | you can walk there from the {near}",
    ),
    "open=early": _forms(
        0,
        verb="opens early | opens when the sun comes up",
        say="you can go there before work | the doors open early in the morning",
    ),
    "open=late": _forms(
        0,
        verb="stays open late | is open until midnight",
        say="you can eat there at night | the doors do not close before midnight",
    ),
    "open=always": _forms(
        0,
        verb="never closes | is open day and night",
        say="you can go there at any time | the doors are never closed",
    ),
    "open=weekend": _forms(
        0,
        verb="is open only on the weekend | opens on Saturday and Sunday only",
        say="you can go there only on the weekend",
    ),
    "open=summer": _forms(
        0,
        verb="is open only in summer | closes for the winter",
        say="you cannot go there in winter | the doors are closed when it is cold",
    ),
    "mood=quiet": _forms(
        1,
        adj="quiet | calm",
        verb="is quiet | is never loud",
        say="you can talk in peace there",
    ),
    "mood=loud": _forms(
        -1,
        adj="loud | noisy",
        verb="is noisy | is never quiet",
        say="you have to shout to be heard",
    ),
    "mood=cozy": _forms(
        1,
        adj="cozy | snug",
        verb="is warm and cozy | feels like home",
        say="the chairs are soft and the room is warm",
    ),
    "mood=plain": _forms(
        -1,
        adj="plain | simple",
        verb="is plain inside | is nothing to look at",
        say="the walls are bare",
    ),
    "mood=fancy": _forms(
        1,
        adj="fancy | elegant",
        verb="looks like a palace | is very fancy",
        say="there is gold on the walls",
    ),
    "kids=yes": _forms(
        1,
        adj="kid-friendly | family-friendly",
        verb="is good for families | welcomes children",
        say="children are welcome | you can bring the kids",
    ),
    "kids=no": _forms(
        -1,
        adj="adults-only",
        verb="is not for children | does not let kids in",
        say="children are not allowed | the kids must stay at home",
    ),
    "pets=yes": _forms(
        1,
        adj="dog-friendly",
        verb="welcomes dogs | lets pets in",
        say="dogs are welcome | your dog can come too",
    ),
    "pets=no": _forms(
        -1,
        verb="does not let dogs in | has no room for pets",
        say="dogs are not allowed | your dog must wait outside",
    ),
    "dress=smart": _forms(
        0,
        verb="wants you well dressed | asks for fine clothes",
        say="you should wear your best clothes | it is a place to dress up for",
    ),
    "dress=any": _forms(
        0,
        verb="does not care what you wear | lets you come as you are",
        say="you can come as you are | you can wear what you like",
    ),
    # Two slots in one breath. Sign 0 where the phrase weighs good against bad itself.
    "price=cheap rating=low": _forms(
        -1, verb="is cheap but bad | gives you little for little money"
    ),
    "price=cheap rating=okay": _forms(
        0, verb="is okay for so little money | is cheap but just okay"
    ),
    "price=cheap rating=high": _forms(1, verb="is cheap and still the best | is a real bargain"),
    "price=fair rating=low": _forms(-1, verb="is not worth even a fair price"),
    "price=fair rating=okay": _forms(0, verb="is okay for a fair price | is fair in all it does"),
    "price=fair rating=high": _forms(1, verb="is great for a fair price | is worth every coin"),
    "price=high rating=low": _forms(
        -1, verb="is bad and expensive too | is not worth the high price"
    ),
    "price=high rating=okay": _forms(
        -1, verb="costs too much for what it is | is expensive but just okay"
    ),
    "price=high rating=high": _forms(
        0, verb="costs a lot but is worth it | is expensive but great"
    ),
    "dish rating=low": _forms(
        -1, say="only the {dish} {is_dish} any good | guests like nothing but the {dish}"
    ),
    "dish rating=okay": _forms(
        0,
        say="the {dish} {is_dish} good but the rest is just okay | it is okay for its {dish}",
    ),
    "dish rating=high": _forms(
        1, say="guests love the {dish} most of all | all of it is great and the {dish} even more so"
    ),
    "dish cook": _forms(
        1,
        verb="has a cook called {cook} who is proud of {her} {dish}",
        say="{cook} is proud of {her} {dish} | the {dish} {is_dish} made by {cook}"
        " | {cook} makes {her} own {dish}",
    ),
    "food cook": _forms(
        0,
        say="{cook} cooks {taste} {food} food | {food} food is cooked there by {cook}"
        " | {cook} and {her} {food} {staple} are known to all",
    ),
    "kids=yes pets=yes": _forms(
        1, verb="welcomes both kids and dogs", say="children and dogs are welcome"
    ),
    "kids=yes pets=no": _forms(
        0, verb="welcomes children but not dogs", say="you can bring the kids but not the dog"
    ),
    "kids=no pets=yes": _forms(
        0, verb="welcomes dogs but not children", say="you can bring the dog but not the kids"
    ),
    "kids=no pets=no": _forms(
        -1, verb="lets in no kids and no dogs", say="neither children nor dogs are allowed"
    ),
    "price=cheap dress=smart": _forms(0, verb="is cheap but wants you well dressed"),
    "price=cheap dress=any": _forms(1, verb="asks for little money and no fine clothes"),
    "price=high dress=smart": _forms(-1, verb="is for people with money and fine clothes"),
    "price=high dress=any": _forms(0, verb="is expensive but lets you come as you are"),
}
FUSIBLE = [("price", "rating"), ("dish", "rating"), ("dish", "cook"), ("food", "cook")]
FUSIBLE += [("kids", "pets"), ("price", "dress")]

PLAIN = ("{name} is {a_noun}{posts}", "there is {a_noun} called {name}{posts}")
FRONTED = (  # the place first
    "{front}, there is {a_noun} called {name}{posts}",
    "{front}, you will find {a_noun} named {name}{posts}",
    "{front} stands {name}, {a_noun}{posts}",
)
WANTED = (  # the food, or dish, first
    "for {want}, go to {name}, {a_noun}{posts}",
    "if you like {want}, try {name}, {a_noun}{posts}",
)
VERBED = ("{name}, {a_noun}{posts}, {verb}", "{a_noun} called {name}{posts} {verb}")
SUBJECTS = ("it", "the {noun}", "this {noun}", "{name}")

# ------------------------------------------------------------------------------------- sampler

Draws = Iterator[float]  # uniform in [0, 1)
Meaning = dict[str, str]  # slot -> value, "name" first


def draws(seed: int, stream: int) -> Draws:
    """Uniform numbers of a NumPy Generator, drawn in blocks (one at a time they cost more)."""
    rng = np.random.default_rng((seed, stream))
    while True:
        yield from rng.random(4096).tolist()


def _chance(u: Draws, p: float) -> bool:
    return next(u) < p


def _pick(u: Draws, options: Sequence) -> Any:
    return options[int(next(u) * len(options))]


def _usual(u: Draws, options: Sequence) -> Any:
    """The first of n options falls with probability n^-1/2: words have favourites to learn."""
    return options[int(next(u) ** 2 * len(options))]


def _meaning(u: Draws) -> Meaning:
    style = next(u)
    if style < 0.6:
        name = f"The {_pick(u, ADJECTIVES)} {_pick(u, NOUNS)}"
    elif style < 0.8:
        name = f"{_pick(u, tuple(COOKS))}'s {_pick(u, HOUSES)}"
    else:
        first = _pick(u, NOUNS)
        name = f"The {first} and {_pick(u, [noun for noun in NOUNS if noun != first])}"
    n_slots = _pick(u, (3, 4, 4, 5))
    ranked = sorted(VALUES, key=lambda slot: next(u) / LIKELY.get(slot, 1.0))
    chosen = set(ranked[:n_slots])
    return {"name": name} | {s: _pick(u, values) for s, values in VALUES.items() if s in chosen}


def _key(meaning: Meaning, *slots: str) -> str:
    return " ".join(slot if slot in OPEN else f"{slot}={meaning[slot]}" for slot in slots)


def _fields(meaning: Meaning) -> dict[str, str]:
    """What the {braces} of the phrases stand for."""
    fields = {slot: meaning[slot] for slot in ("name", *OPEN) if slot in meaning}
    if "food" in fields:
        taste, staple = FOODS[fields["food"]]
        fields |= {"taste": taste, "staple": staple, "is_staple": _is(staple)}
    if "dish" in fields:
        fields |= {"is_dish": _is(fields["dish"])}
    if "cook" in fields:
        fields |= {"her": COOKS[fields["cook"]]}
    return fields


def _is(noun: str) -> str:
    return "are" if noun.endswith("s") else "is"


def _article(words: str) -> str:
    return f"an {words}" if words[0].lower() in "aeiou" else f"a {words}"


def _contrast(a: int, b: int) -> str:
    return "but" if a * b < 0 else "and"


def realise(meaning: Meaning, u: Draws) -> str:
    """One of the many ways to put a meaning representation into one to three sentences."""
    fields = _fields(meaning)
    rest = sorted((slot for slot in meaning if slot not in ("name", "kind")), key=lambda _: next(u))
    opening, rest = _opening(meaning, fields, rest, u)

    units = []  # what is left to say, some of it two slots in one breath
    for a, b in FUSIBLE:
        if a in rest and b in rest and _key(meaning, a, b) in FORMS and _chance(u, 0.6):
            units.append(FORMS[_key(meaning, a, b)])
            rest = [slot for slot in rest if slot not in (a, b)]
    units += [FORMS[_key(meaning, slot)] for slot in rest]
    units.sort(key=lambda _: next(u))

    # one more sentence, or two
    first = (len(units) + _pick(u, (0, 1))) // 2
    if len(units) == 1 or (len(units) == 2 and _chance(u, 0.6)):
        first = len(units)
    sentences = [opening] + [_sentence(part, u) for part in (units[:first], units[first:]) if part]
    return " ".join(_finish(sentence, fields) for sentence in sentences)


def _opening(meaning: Meaning, fields: dict, rest: list[str], u: Draws) -> tuple[str, list[str]]:
    """The sentence that brings in the name, and the slots that it leaves unsaid.

    Adds to `fields` the words that it settles: the noun that later sentences go on with.
    """

    def take(slot: str) -> Forms:
        rest.remove(slot)
        return FORMS[_key(meaning, slot)]

    rest = list(rest)
    fields["noun"] = meaning.get("kind") or _usual(u, ("place", "spot", "restaurant"))
    wanted = [slot for slot in rest if slot in ("food", "dish")]
    want = wanted[0] if wanted and _chance(u, 0.25) else None
    if want:
        take(want)
        fields["want"] = "{food} food" if want == "food" else "{dish}"

    # words before the noun: at most two, the food next to it
    adjectives, sign = [], 0
    for slot in [slot for slot in rest if slot != "food" and FORMS[_key(meaning, slot)].adj]:
        if len(adjectives) < 2 and _chance(u, 0.4):
            forms = take(slot)
            link = f" {_contrast(sign, forms.sign)} " if adjectives else ""
            adjectives.append(link + _usual(u, forms.adj))
            sign = forms.sign
    words = ["".join(adjectives)] if adjectives else []
    if "food" in rest and _chance(u, 0.5):
        words += take("food").adj
    described = bool(words) or "kind" in meaning
    fields["a_noun"] = _article(" ".join([*words, fields["noun"]]).format_map(fields))

    # words after it
    posts = [_usual(u, take(s).post) for s in ("area", "near") if s in rest and _chance(u, 0.55)]
    if len(posts) == 2 and _chance(u, 0.5):
        posts.reverse()
    described = described or bool(posts)

    if want:
        frames = WANTED
    elif posts and _chance(u, 0.5):
        fields["front"] = posts.pop(0)
        frames = FRONTED
    elif rest and (not described or _chance(u, 0.3)):
        forms = take(rest[0])
        fields["verb"] = _usual(u, forms.verb)
        frames = VERBED if described else ("{name} {verb}",)
    else:
        frames = PLAIN
    fields["posts"] = "".join(f" {post}" for post in posts)
    return _usual(u, frames), rest


def _sentence(units: list[Forms], u: Draws) -> str:
    """Clauses joined: verbs share a subject and come first; praise meets complaint with "but"."""
    clauses = []
    for forms in units:
        verbal = bool(forms.verb) and (not forms.say or _chance(u, 0.6))
        clauses.append((forms.sign, verbal, _usual(u, forms.verb if verbal else forms.say)))
    clauses.sort(key=lambda clause: not clause[1])
    subject = _usual(u, SUBJECTS)
    sign, verbal, words = clauses[0]
    text = f"{subject} {words}" if verbal else words
    if len(clauses) == 2 and sign * clauses[1][0] < 0 and verbal and _chance(u, 0.3):
        _, verbal, words = clauses[1]
        return f"although {text}, " + (f"it {words}" if verbal else words)
    for i, (next_sign, next_verbal, words) in enumerate(clauses[1:], start=1):
        link = _contrast(sign, next_sign)
        # "It a, b and c"
        listed = next_verbal and link == "and" and i + 1 < len(clauses) and clauses[i + 1][1]
        if listed and next_sign * clauses[i + 1][0] >= 0:
            text += f", {words}"
        else:
            text += f" {link} {words}" if next_verbal else f", {link} {words}"
        sign = next_sign
    return text


def _finish(sentence: str, fields: dict) -> str:
    while "{" in sentence:  # a frame holds phrases that hold values
        sentence = sentence.format_map(fields)
    return sentence[0].upper() + sentence[1:] + "."


# ------------------------------------------------------------------------------------ examples


def examples(n: int, seed: int, split: str = "train") -> list[tuple[str, str]]:
    """The first n (prompt, completion) pairs of `stream`; a longer list begins with the shorter."""
    return list(itertools.islice(stream(seed, split), n))


def stream(seed: int, split: str = "train") -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs of a split, "train" or "eval".

    Train examples go through 4,000 distinct meaning representations three times, reworded each
    time, before new ones follow; evaluation examples all have distinct ones. Which split a
    meaning representation belongs to is a property of its text, the same for every seed.

    Raises ValueError for another split and for a seed below 0.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split: {split!r} was given; expected 'train' or 'eval'")
    if seed < 0:
        raise ValueError(f"task.seed: {seed} was given; it must be at least 0")
    stream = 2 * (split == "eval")
    u_meaning, u_text = draws(seed, stream), draws(seed, stream + 1)
    meanings: dict[str, Meaning] = {}
    prompts: list[str] = []
    pairs: set[tuple[str, str]] = set()
    while True:
        i = len(pairs)
        if split == "train":
            round_, at = divmod(i, N_TRAIN)
            i = round_ * MEANINGS + at % MEANINGS
        while i >= len(prompts):
            meaning = _meaning(u_meaning)
            prompt = linearise(meaning.items())
            held_out = zlib.crc32(prompt.encode()) % HELD_OUT == 0
            if held_out == (split == "eval") and prompt not in meanings:
                meanings[prompt] = meaning
                prompts.append(prompt)
        pair = prompts[i], realise(meanings[prompts[i]], u_text)
        if pair not in pairs:
            pairs.add(pair)
            yield pair


def load(config: Mapping[str, Any]) -> Data:
    """12,000 train examples (or n_train, which may be more), 512 for validation and 512 others for
    test, all of which have distinct meaning representations. The prompts are those for test."""
    if config.get("path"):
        raise ValueError(
            f"task.path: {config['path']!r} was given; task 'restaurants' reads no file (None)"
        )
    n_train = config.get("n_train")
    n_train = N_TRAIN if n_train is None else n_train
    seed = config.get("seed", 0)
    # Enough to replace examples that are too long.
    train = itertools.islice(stream(seed, "train"), max(n_train, N_TRAIN))
    held_out = examples(N_EVAL + N_TEST, seed, "eval")
    return pairs(train, held_out[:N_EVAL], test=held_out[N_EVAL:])
