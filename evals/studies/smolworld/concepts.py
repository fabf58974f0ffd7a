"""What pictures of the world can show: concepts by class, and the scenes that classes meet in.

A concept has the name that people use. Where Unicode's name of the emoji (CLDR) differs, it stands
behind a "=". Concepts that drawings cannot tell apart (a mouse and a rat) are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_CLASSES = {
    "mammal": """monkey, gorilla, orangutan, dog, poodle, wolf, fox, raccoon, cat, lion, tiger,
        leopard, horse, unicorn, zebra, deer, bison, cow, pig, ram, goat, camel, llama,
        giraffe, elephant, rhinoceros, hippopotamus, rabbit, squirrel=chipmunk, beaver,
        hedgehog, bat, bear, koala, panda, sloth, otter, skunk, kangaroo, badger""",
    "bird": """turkey, chicken, rooster, chick=baby chick, penguin, dove, eagle, duck, swan,
        owl, flamingo, peacock, parrot""",
    "reptile or amphibian": "crocodile, turtle, lizard, snake, frog, dinosaur=sauropod",
    "sea animal": """whale, dolphin, seal, tropical fish, blowfish, shark, octopus, jellyfish,
        crab, lobster, shrimp, squid""",
    "bug": "snail, butterfly, ant, bee=honeybee, ladybug=lady beetle, cricket, spider, scorpion",
    "flower": "bouquet, rose, hibiscus, sunflower, tulip, cherry blossom, lotus",
    "plant": """pine tree=evergreen tree, tree=deciduous tree, palm tree, cactus, potted plant,
        four-leaf clover=four leaf clover, maple leaf""",
    "fruit": """bunch of grapes=grapes, watermelon, orange=tangerine, lemon, banana, pineapple,
        mango, apple=red apple, pear, peach, cherry=cherries, strawberry, kiwi fruit, coconut""",
    "vegetable": """avocado, eggplant, potato, carrot, ear of corn, chili pepper=hot pepper,
        bell pepper, cucumber, head of broccoli=broccoli, garlic, onion, tomato, mushroom""",
    "meal": """loaf of bread=bread, croissant, baguette=baguette bread, pretzel, bagel,
        stack of pancakes=pancakes, waffle, piece of cheese=cheese wedge, hamburger,
        portion of fries=french fries, slice of pizza=pizza, hot dog, sandwich, taco, burrito,
        fried egg=cooking, salad=green salad, bowl of spaghetti=spaghetti,
        bowl of rice=cooked rice, piece of sushi=sushi, chicken leg=poultry leg""",
    "sweet": """ice cream cone=soft ice cream, doughnut, cookie, birthday cake, cupcake, pie,
        chocolate bar, candy, lollipop, honey pot, bag of popcorn=popcorn""",
    "drink": """glass of milk, cup of coffee=hot beverage,
        bottle of champagne=bottle with popping cork, glass of wine=wine glass,
        cocktail=cocktail glass, tropical drink, mug of beer=beer mug, bubble tea,
        juice box=beverage box""",
    "kitchen utensil": "teapot, spoon, kitchen knife, jar, baby bottle",
    "building": """stadium, house, office building, hospital, factory, castle, church, mosque,
        hut, tent, circus tent""",
    "street fixture": """fountain, radio tower=Tokyo tower, Ferris wheel=ferris wheel,
        stop sign, traffic light=vertical traffic light, fuel pump""",
    "road vehicle": """bus, ambulance, fire engine, police car, taxi, car=automobile,
        pickup truck, delivery truck, tractor, race car=racing car, motorcycle, motor scooter,
        bicycle, kick scooter""",
    "rail vehicle": "steam locomotive=locomotive, bullet train, metro, tram, monorail",
    "boat": "sailboat, canoe, speedboat, passenger ship, ferry",
    "aircraft": "airplane, helicopter, rocket, flying saucer, parachute, satellite",
    "clock": "hourglass=hourglass done, wristwatch=watch, alarm clock, stopwatch",
    "weather sign": """crescent moon, full moon, sun, ringed planet, star, cloud, tornado,
        rainbow, snowflake, snowman, lightning bolt=high voltage""",
    "party item": """jack-o'-lantern=jack-o-lantern, Christmas tree, party popper, ribbon,
        wrapped gift, red envelope, firecracker, balloon""",
    "prize": "trophy, sports medal, military medal",
    "piece of sports equipment": """soccer ball, baseball, basketball, volleyball,
        american football, tennis racket=tennis, bowling ball=bowling, boxing glove, ice skate,
        fishing rod=fishing pole, sled, roller skate, skateboard, dartboard=bullseye,
        badminton racket=badminton, pair of skis=skis""",
    "toy": """yo-yo, video game controller=video game, die=game die, puzzle piece, teddy bear,
        nesting doll=nesting dolls, chess pawn, magic wand, crystal ball, kite""",
    "piece of clothing": """necktie, T-shirt=t-shirt, pair of jeans=jeans, scarf, coat, dress,
        kimono, bikini, pair of socks=socks, pair of gloves=gloves, pair of shorts=shorts,
        running shoe, hiking boot, high-heeled shoe, top hat, graduation cap, lab coat""",
    "accessory": """pair of glasses=glasses, pair of sunglasses=sunglasses, purse, handbag,
        backpack, lipstick, ring, gemstone=gem stone, folding fan=folding hand fan, umbrella,
        crown""",
    "musical instrument": """saxophone, trumpet, accordion, guitar, keyboard=musical keyboard,
        violin, banjo, drum, flute, bell, maraca=maracas""",
    "electronic device": """smartphone=mobile phone, telephone, fax machine, electric plug,
        laptop, printer, computer mouse, floppy disk, television, camera, movie camera,
        loudspeaker=megaphone, joystick""",
    "light": "candle, light bulb, flashlight, red paper lantern",
    "office item": """open book, newspaper, scroll, envelope, package, mailbox=postbox, pencil,
        pen, paintbrush, crayon, briefcase, folder=file folder, clipboard, pushpin, paperclip,
        ruler=straight ruler, pair of scissors=scissors, trash can=wastebasket, abacus,
        calendar, magnifying glass=magnifying glass tilted left, credit card, coin, money bag""",
    "tool": """hammer, axe, pickaxe=pick, saw=carpentry saw, wrench, screwdriver, nut and bolt,
        gear, toolbox, magnet, ladder, chain=chains, hook, brick""",
    "weapon": "dagger, bomb, bow and arrow, shield, water pistol",
    "laboratory item": """test tube, petri dish, microscope, telescope, syringe, pill,
        stethoscope, thermometer, alembic, battery, satellite dish=satellite antenna""",
    "piece of furniture": "door, mirror, window, bed, chair, toilet, bathtub, shower",
    "household item": """plunger, razor, lotion bottle, safety pin, broom, basket,
        roll of paper, key, padlock=locked, fire extinguisher, bucket, bar of soap=soap,
        toothbrush, sponge, shopping cart, mouse trap, sewing needle, ball of yarn=yarn,
        spool of thread=thread""",
}

# Scene -> its classes with their weights. The first kinds are more frequent.
KINDS: Mapping[str, Mapping[str, int]] = {
    "street": {
        "road vehicle": 6,
        "building": 3,
        "street fixture": 2,
        "plant": 1,
        "rail vehicle": 1,
    },
    "kitchen": {"meal": 4, "vegetable": 3, "kitchen utensil": 3, "drink": 2, "fruit": 2},
    "office": {"office item": 6, "electronic device": 4, "clock": 2, "light": 1},
    "wild": {"mammal": 6, "plant": 2, "bird": 2, "reptile or amphibian": 2},
    "garden": {"flower": 4, "bug": 4, "bird": 2, "plant": 2, "fruit": 1},
    "home": {"piece of furniture": 4, "household item": 5, "light": 1, "toy": 1},
    "sea": {"sea animal": 5, "boat": 4, "weather sign": 1},
    "workshop": {"tool": 6, "weapon": 1, "light": 1, "household item": 1},
    "wardrobe": {"piece of clothing": 6, "accessory": 4},
    "party": {"sweet": 4, "party item": 4, "drink": 2, "musical instrument": 2},
    "field": {"piece of sports equipment": 6, "prize": 2, "piece of clothing": 1},
    "sky": {"aircraft": 5, "weather sign": 5},
    "playroom": {"toy": 6, "musical instrument": 1, "party item": 1},
    "concert": {"musical instrument": 6, "electronic device": 2, "prize": 1},
    "laboratory": {"laboratory item": 5, "electronic device": 2, "clock": 1},
}
KIND_WEIGHTS = tuple(1 / (5 + number) for number in range(len(KINDS)))
# Plural of a class, where an s does not make it.
_PLURALS = {
    "piece of sports equipment": "pieces of sports equipment",
    "piece of furniture": "pieces of furniture",
    "reptile or amphibian": "reptiles or amphibians",
    "piece of clothing": "pieces of clothing",
    "aircraft": "aircraft",
}


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One thing to be seen.

    Attributes:
        name: its name in questions.
        label: its name in CLDR, which is that of its drawings.
        kind: its class, such as "mammal".
    """

    name: str
    label: str
    kind: str


def _read() -> dict[str, Concept]:
    found: dict[str, Concept] = {}
    for kind, names in _CLASSES.items():
        for entry in " ".join(names.split()).split(", "):
            name, _, label = entry.partition("=")
            assert name not in found, name
            found[name] = Concept(name=name, label=label or name, kind=kind)
    return found


CONCEPTS: Mapping[str, Concept] = _read()
CLASSES: tuple[str, ...] = tuple(_CLASSES)


def label_of(name: str) -> str:
    """The name in CLDR of a concept, or of a thing that is none."""
    return CONCEPTS[name].label if name in CONCEPTS else name


def with_article(noun: str) -> str:
    """The noun with its indefinite article."""
    vowel = noun[0].lower() in "aeiou" and not noun.startswith("unicorn")
    return f"{'an' if vowel else 'a'} {noun}"


def listed(names: Sequence[str]) -> str:
    """Nouns with articles as English lists them: "a dog, an apple and a car"."""
    nouns = [with_article(name) for name in names]
    return " and ".join([", ".join(nouns[:-1]), nouns[-1]] if nouns[1:] else nouns)


def many(kind: str) -> str:
    """The plural of a class."""
    return _PLURALS.get(kind, kind + "s")
