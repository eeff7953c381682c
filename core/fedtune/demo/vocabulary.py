"""The vocabulary of the demo: plain English nouns, names and quantities that public and federated skills share.

A base model knows words before it knows a household's devices, so pretraining shows every word of this file in free
text and in public calls. It never shows a federated call.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    "anna ben carla david emma felix grace henry ida jonas karin leo maria nora oscar paula simon tara viktor zoe"
)
ROOMS = ("attic", "basement", "bathroom", "bedroom", "hall", "kitchen", "nursery", "office", "porch", "studio")
PLACES = _words(
    "airport bakery beach cinema clinic gym harbor hospital library market museum park pharmacy school stadium station "
    "theater university work zoo"
)
FOODS = _words(
    "apples beans beef bread broccoli butter carrots cheese chicken corn eggs fish flour lamb milk mushrooms noodles "
    "onions pasta peas pizza pork potatoes rice salmon shrimp soup spinach sugar tofu tomatoes turkey"
)
DRINKS = ("chai", "cocoa", "coffee", "espresso", "lemonade", "matcha", "mocha", "tea")
PLANTS = _words(
    "basil cactus daisies ferns herbs hedge ivy lavender lawn lilies mint orchids palms peppers roses sage shrubs "
    "strawberries sunflowers tulips"
)
SPORTS = _words("boxing climbing cycling dancing hiking pilates rowing running skating skiing swimming tennis yoga")
GENRES = _words("blues classical country disco folk funk gospel jazz metal opera pop punk reggae rock soul techno")
MATERIALS = ("brass", "cedar", "copper", "nylon", "oak", "pine", "plywood", "resin", "rubber", "steel")
OBJECTS = _words(
    "bag ball blanket book bottle box bracket brush camera candle chair clock cup desk drawer frame gear guitar hammer "
    "handle helmet hinge hook jacket key knob ladder lamp mirror mug notebook pen phone pillow plate radio ring rope "
    "scarf shelf shoe spoon stand table tent towel tray tripod umbrella vase wallet wheel"
)
APPLIANCES = ("boiler", "dishwasher", "dryer", "fan", "freezer", "fridge", "heater", "pump", "sauna", "washer")
MEDICINES = ("aspirin", "calcium", "insulin", "iron", "magnesium", "vitamins", "zinc")
COLORS = ("amber", "blue", "crimson", "gold", "green", "orange", "pink", "purple", "red", "teal", "white", "yellow")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
TIMES = tuple(f"{hour}:{minute:02d}" for hour in range(5, 24) for minute in (0, 10, 15, 20, 30, 40, 45, 50))

NOUNS = (
    PEOPLE + ROOMS + PLACES + FOODS + DRINKS + PLANTS + SPORTS + GENRES + MATERIALS + OBJECTS + APPLIANCES + MEDICINES
    + COLORS + DAYS
)  # fmt: skip

HOUSE_WORDS = _words(
    "amount battery bore brew buzz cap car channel charge climate compost copies cups cut deep defrost degrees depth "
    "device dose drill drink drive dry energy fade feed fertilizer fill food front garden genre goal grams grass "
    "health height high hours ice insert kitchen limit liters log low lower material measured media medicine minutes "
    "mow music navigate object oven over percent plant play power preheat pressure price print pulse rear record run "
    "saw sleep slept speakers speed sport steps tape thaw time tires track trim turns upper volume walk warn water "
    "watts wearable wheels wide width workout workshop"
)
"""Words that occur in free text and copying without a call, so that the tokenizer and the base model know them."""
