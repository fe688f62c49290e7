"""The words and sentence patterns of the training texts: data, no logic.

Slots stand in braces; problems.py and passages.py fill them. The bundled model's tokenizer has one token for every word
that occurs here, so adding a word changes that model.
"""

HE = (
    "Tom Ben Sam Max Leo Paul Omar Ivan Hugo Karl Adam Noah Felix Oscar Jack Erik Amir Peter Luis Victor Theo David "
    "Simon Mark"
).split()
SHE = (
    "Anna Maria Lucy Emma Nina Clara Rosa Julia Mia Lena Sofia Ruth Ada Vera Lily Dora Zoe Hana Kate Irene Alma Nora "
    "Eva Iris"
).split()
NAMES = sorted(HE + SHE)

OBJECTS = (
    "apples pears plums lemons oranges peaches cherries nuts eggs cookies cakes pens pencils books stamps coins shells "
    "stones marbles cards balls toys kites hats candles flowers roses seeds tickets bottles cups plates keys buttons "
    "ribbons beads stickers photos magnets posters"
).split()
CONTAINERS = "boxes bags baskets jars shelves trays packs crates".split()
SYLLABLES = "ba be bo da di do fa fe ga go ka ki ko la le li lo ma me mi mo na ne ni no pa pe po ra re ri ro sa se so ta te ti to va vi wa we za zo".split()  # of words that nobody knows
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday")

# Word problems. {P} a sentence's subject, {p} the same inside a sentence, {T} him or her (or the name), {M} another
# person, {b} the amount, {k} a count of groups, {m} the size of a group, {o} the things, {c} what holds a group.
HAS = ("{N} has {a} {o}.", "{N} owns {a} {o}.", "{N} starts with {a} {o}.", "At first {N} has {a} {o}.")
HAS_GROUPS = (
    "{N} has {k} {c} with {m} {o} each.",
    "{N} owns {k} {c} of {m} {o} each.",
    "There are {m} {o} in each of the {k} {c} of {N}.",
)
GAINS = (
    "{P} buys {b} more {o}.",
    "{P} buys {b} more.",
    "{P} finds {b} {o}.",
    "{M} gives {T} {b} {o}.",
    "Then {p} gets {b} more {o}.",
    "{P} picks up {b} more {o}.",
    "Later {p} wins {b} {o}.",
    "{P} receives {b} {o} from {M}.",
    "Then {M} brings {T} {b} more.",
    "{P} collects {b} more {o}.",
    "{P} gets {b} {o} from {M}.",
    "{M} gives {b} {o} to {N}.",
    "{P} finds {b} more.",
)
LOSSES = (
    "{P} gives {b} {o} to {M}.",
    "{P} loses {b} {o}.",
    "{P} sells {b} {o}.",
    "{P} sells {b}.",
    "Then {p} gives away {b} {o}.",
    "Later {p} drops {b} {o}.",
    "{P} lends {b} {o} to {M}.",
    "{M} takes {b} {o} from {T}.",
    "Then {p} throws away {b}.",
    "{P} gives {M} {b} {o}.",
    "{P} uses {b} {o}.",
    "{P} eats {b}.",
    "{P} eats {b} {o}.",
    "{P} breaks {b} {o}.",
    "{P} gives {b} to {M}.",
)
GAINS_GROUPS = ("{P} buys {k} {c} with {m} {o} each.", "Then {p} gets {k} {c} of {m} {o} each.")
MORE_THAN = ("{M} has {b} more {o} than {N}.", "{M} has {b} more than {N}.")
FEWER_THAN = ("{M} has {b} fewer {o} than {N}.", "{M} has {b} fewer than {N}.")
TIMES_AS_MANY = ("{M} has {k} times as many {o} as {N}.", "{M} has {k} times as many as {N}.")
OTHER_HAS = ("{M} has {b} {o}.", "{M} owns {b} {o}.")
SHARES = (
    "{P} shares them equally among {k} friends.",
    "{P} divides all {o} equally among {k} children.",
    "{P} puts the {o} into {k} {c}, the same number in each.",
)

ASK_NOW = (
    "How many {o} does {N} have now?",
    "How many {o} does {N} have in the end?",
    "How many {o} are left with {N}?",
    "How many {o} does {N} have?",
    "How many {o} does {N} have left?",
    "How many {o} are left?",
    "How many {o} does {p} have now?",
    "How many does {p} have now?",
)
ASK_OTHER = ("How many {o} does {M} have?", "How many {o} are with {M}?")
ASK_TOGETHER = ("How many {o} do they have together?", "How many {o} do {N} and {M} have in all?")
ASK_FRIEND = ("How many {o} does each friend get?", "How many {o} go to each friend?")
ASK_CHILD = ("How many {o} does each child get?", "How many {o} go to each child?")
ASK_HOLDER = ("How many {o} are in each of the {c}?", "How many {o} go into each of the {c}?")

PRICES = ("The {o} cost {m} dollars each.", "Each of the {o} costs {m} dollars.")
BUYS = ("{N} buys {k} {o}.", "{N} takes {k} {o}.")
BUYS_TOO = ("{P} also buys {k} {o} for {m} dollars each.", "Then {p} takes {k} {o} for {m} dollars each.")
PAYS = ("{P} pays with {b} dollars.", "{P} gives the seller {b} dollars.")
ASK_PRICE = ("How many dollars does {N} pay?", "How many dollars does {N} spend?")
ASK_CHANGE = ("How many dollars does {N} get back?", "How many dollars are left?")

# Stories scattered over a long text: every sentence names its person and, for the order, its day. {v} is a verb.
FAR_HAS = ("{N} has {a} {o}.", "At first {N} has {a} {o}.", "Before {day} {N} has {a} {o}.")
FAR_HAS_GROUPS = ("{N} has {k} {c} with {m} {o} each.", "At first {N} has {k} {c} with {m} {o} each.")
FAR_CHANGES = (
    "On {day} {N} {v} {b} {o}.",
    "It is known that on {day} {N} {v} {b} {o}.",
    "Then on {day} {N} {v} {b} {o}.",
)
FAR_GAINS = "buys finds gets wins receives collects".split()
FAR_LOSSES = "sells loses drops lends uses breaks".split()
FAR_ASK_NOW = ("How many {o} does {N} have after {day}?", "How many {o} are left with {N} after {day}?")
FAR_ASK_SHARE = (
    "If {N} shares the {o} equally among {k} friends after {day}, how many {o} does each friend get?",
    "After {day} {N} shares the {o} equally among {k} friends. How many {o} does each friend get?",
)
# The worked answer says again what the text says, and computes.
FAR_TELLS = (
    "At first {N} has {a}.",
    "At first {N} has {k} {c} with {m}: {step}",
    "On {day} {N} {v} {b}: {step}",
    "Among {k} friends: {step}",
)

# Recall. {key} is a place and a thing; codes are numbers, the others words.
PLACES = "locker gate garage office cabin boat attic school garden library hotel studio".split()
SECRETS = {"code": (0, 0), "password": (2, 4), "sign": (2, 3)}  # the fewest and most words of a value; 0: a number
VALUES = (
    "red blue green yellow white black silver golden purple brown tiger eagle fox wolf bear owl otter falcon rabbit "
    "dragon horse raven lion whale turtle maple cedar willow oak river mountain desert forest island thunder winter "
    "summer star moon comet anchor arrow hammer lantern mirror needle paper rocket"
).split()
FACTS = (
    "The {key} of {N} is {value}.",
    "Today the {key} of {N} is {value}.",
    "It is known that the {key} of {N} is {value}.",
    "As before the {key} of {N} is {value}.",
)
ASK_FACT = ("What is the {key} of {N}?", "Which {key} does {N} use?", "What {key} was {N} given?")

# Sentences that lead nowhere. {X} may be anybody.
ADJECTIVES = "old small quiet bright tall narrow busy empty cold warm wooden distant".split()
ANIMALS = "cat dog bird goat cow fish frog mouse duck sheep".split()
SPOTS = "market station harbor bridge village tower field valley street hill kitchen theater".split()
THINGS = "table chair clock window door wagon bench ladder basket rope carpet lamp".split()
MOTIONS = "walks runs travels wanders returns hurries".split()
SKIES = "rain snow fog wind sunshine clouds".split()
FILLERS = (
    "The {adjective} {animal} {motion} to the {spot}.",
    "One {adjective} {thing} stands near the {spot}.",
    "There is {sky} over the {spot} today.",
    "{X} {motion} along the {adjective} {spot}.",
    "The {spot} is {adjective} and {adjective2}.",
    "Nobody sits on the {adjective} {thing}.",
    "In the {spot} there is a {thing} and one {adjective} {thing2}.",
    "The {animal} sleeps under the {thing}.",
    "People say that the {spot} was {adjective} before.",
    "The road from the {spot} to the {spot2} is {n} miles long.",
    "{X} paints the {thing} in the {spot}.",
    "The {animal} and the {animal2} play by the {spot}.",
    "After the {sky} the {spot} looks {adjective}.",
    "A train with {n} wagons passes the {adjective} {spot}.",
    "{X} waits for the {sky} to end.",
    "It takes {n} minutes to reach the {spot}.",
)
