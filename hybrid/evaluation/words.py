"""The words that skills draw from. None stands in two lists, so a word alone says what it is."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """Anna Ben Carla David Emma Felix Grace Henry Ida Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Victor Walter
    Zoe Alice Bruno Clara Dora Erik Fiona George Hanna Ivan Julia Karl Laura Mark Nina Oscar Peter Ruth Simon Tom Ursula
    Vera Adam Bella Carlos Diana Elena Frank Gloria Hugo Irene Jonas Kim Lucy Martin Nora Otto Paula Robert Sara Theo
    Alma Boris Cora Dan Edith Fred Gina Helen Isaac Jane Kevin Lena Max Nadia Omar Pia Rita Steve Tara Uma Vince Wanda
    Yuri Zara"""
)
PETS = _words(
    """Milo Rex Luna Rocky Coco Daisy Simba Nala Biscuit Pepper Toby Ginger Buddy Misty Shadow Smokey Tiger Pixel Waffle
    Noodle Pickle Muffin Cookie Oreo Bandit Lucky Rusty Dusty Sandy Willow Hazel Jasper Ziggy Otis Archie Winnie Poppy
    Honey Maple Olive Peanut Pumpkin Teddy Sunny Stormy Patch Snowy Ruby Jade Onyx Copper Pearl Comet Nova Orion Echo
    Ollie Gus Mimi Kiki Lola Zorro Chip Dash"""
)
CITIES = _words(
    """Paris London Berlin Rome Madrid Vienna Prague Lisbon Dublin Oslo Helsinki Stockholm Athens Warsaw Budapest
    Brussels Amsterdam Geneva Zurich Munich Hamburg Milan Venice Naples Porto Seville Moscow Kyiv Istanbul Cairo Nairobi
    Lagos Accra Tunis Delhi Mumbai Bangkok Hanoi Manila Jakarta Seoul Tokyo Osaka Kyoto Beijing Shanghai Sydney
    Melbourne Perth Auckland Toronto Montreal Boston Chicago Denver Dallas Houston Miami Seattle Lima Bogota Quito
    Santiago Havana"""
)
FOODS = _words(
    """apple plum grape lemon banana cherry peach melon mango kiwi onion garlic carrot potato tomato corn rice bread
    butter cheese milk sugar salt soup salad pasta pizza cake jam coffee juice bacon tuna"""
)
ANIMALS = _words(
    """cat dog horse cow sheep goat pig duck goose fox wolf lion zebra monkey mouse rabbit deer moose beaver whale shark
    frog toad snake lizard turtle falcon hawk crow raven robin swan"""
)
THINGS = _words(
    """lamp chair table window book plate fork knife spoon bowl bag coat shoe sock clock phone radio camera mirror
    candle pillow blanket carpet curtain ladder hammer rope wheel bike boat truck kite doll drum flute guitar piano
    violin bell flag coin stamp paper brush comb soap towel broom bucket shovel"""
)
COLOURS = _words("red blue green yellow black white brown pink purple grey silver gold")
JOBS = _words(
    """baker teacher doctor nurse farmer painter singer writer driver pilot sailor judge lawyer dentist tailor barber
    butcher plumber soldier waiter gardener dancer clerk miner weaver tutor coach"""
)
LANGUAGES = _words("French German Spanish Italian Polish Greek Turkish Arabic Hindi Chinese Japanese Korean")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ROOMS = _words("kitchen bedroom bathroom garage cellar hall office attic")
MONEY = _words("dollars euros pounds francs rubles pesos crowns")
TOPICS = _words("sport music science politics history travel fashion health business culture")
VERBS = _words("check clean move close repair sell wash lift hide weigh draw lock")
TITLES = _words(
    """dinner lunch breakfast meeting party concert lesson dream river mountain winter summer evening morning garden
    story secret journey moon star rain snow fire water wind home love night light"""
)

OBJECTS = FOODS + ANIMALS + THINGS
ALL = (
    *(NAMES + PETS + CITIES + OBJECTS + COLOURS + JOBS),
    *(LANGUAGES + DAYS + ROOMS + MONEY + TOPICS + VERBS + TITLES),
)
