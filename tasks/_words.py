"""The words that generated samples are made of.

Answers and the names in questions come from sets without common words, so that an answer never
occurs by chance in a restated question.
"""

ADJECTIVES = (
    "amber ancient autumn bitter blue bold brave brief bright broad broken calm careful cheerful "
    "clever cold copper crimson curious dark deep distant dusty eager early eastern empty faint "
    "famous fancy fierce final foggy fragile frozen gentle giant glad golden grand green grey "
    "handsome happy heavy hidden hollow honest humble hungry idle ivory jolly keen kind large "
    "late lazy little lively lonely loud lucky mellow mighty misty modest narrow neat nervous "
    "nimble noble northern old orange pale patient plain polite proud purple quick quiet rapid "
    "rare red restless rich rough royal rusty sad scarlet secret serious shallow sharp short shy "
    "silent silver simple sleepy slow small smooth solid southern steady steep stern still "
    "strange strong sunny sweet swift tall tame tender thick thin tiny tired upper violet warm "
    "weary western wild winter wise wooden yellow young"
).split()

NOUNS = (
    "abbey acorn anchor apple arrow badger barn basin beach bear beaver bell bench birch blossom "
    "boat bridge brook cabin camel canal candle canyon castle cave cedar chapel cherry cliff "
    "cloud clover comet cottage coyote crane creek crow dawn deer desert dolphin dove dragon "
    "eagle elm falcon farm feather fern ferry field finch flame forest fountain fox garden gate "
    "glacier goose grove gull harbor hare hawk heron hill horse island ivy jungle kettle kite "
    "lagoon lake lantern lark leaf lemon lily lion lizard lodge lynx maple marble marsh meadow "
    "mill mirror moon moose moth mountain mouse oak ocean orchard otter owl palace panda path "
    "pearl pebble pelican pepper pigeon pine planet pond poppy prairie rabbit raven reef ribbon "
    "river robin rocket rose saddle salmon sparrow spruce squirrel stable star stone storm summit "
    "swan temple thistle thunder tiger tower trail tulip tunnel turtle valley village walnut "
    "waterfall whale willow wolf zebra"
).split()

SECRETS = (
    "almond anthem apron bacon bagel balcony bamboo banjo basket biscuit blanket bottle bracelet "
    "brick bronze bucket butter button cabbage cactus camera canvas carpet carrot chalk chimney "
    "cider cinnamon circus coffee collar compass cookie cotton cradle crystal curtain cushion "
    "diamond doctor drum engine fabric fiddle flute galaxy garlic ginger glove granite guitar "
    "hammer harvest helmet honey icicle jacket jelly jewel jigsaw kitchen ladder laptop lava "
    "leather lettuce library lobster locket magnet mango marathon mattress medal melon mitten "
    "muffin museum mustard napkin needle nickel noodle notebook nugget oatmeal olive onion opera "
    "oven oyster paddle paper parcel parsley peanut pencil piano picnic pillow pistol plaster "
    "pocket pottery powder pretzel pudding puzzle quartz quilt radio raisin razor recipe rubber "
    "ruler salad satin scarf school scissors sesame shovel shuttle silk siren sofa soup spoon "
    "stamp statue sugar sweater syrup tablet tailor teapot ticket timber toast tractor trumpet "
    "tuba tunic turnip umbrella vanilla velvet vinegar violin wagon wallet whistle window zipper"
).split()

FIRST_NAMES = (
    "Adam Agnes Albert Alice Amos Anna Arthur Astrid Beatrice Boris Bruno Carla Cecil Clara "
    "Claude Conrad Cora Daniel Daphne David Diana Edgar Edith Elena Eliza Emil Emma Esther Eva "
    "Felix Flora Frank Frida George Gloria Greta Harold Hazel Helen Henry Hugo Ida Igor Irene "
    "Isaac Ivan Jacob Jane Jasper Joan Jonas Julia Karl Kate Laura Leo Lewis Linda Louis Lucy "
    "Luke Mabel Marcus Maria Martha Martin Max Mira Nadia Nathan Nina Nora Oliver Olga Oscar Otto "
    "Paul Petra Philip Rachel Ralph Rosa Ruth Samuel Sara Simon Sofia Stella Theo Thomas Ursula "
    "Vera Victor Walter"
).split()

LAST_NAMES = (
    "Abbott Archer Bailey Baker Barlow Barnes Becker Bennett Bishop Blake Bowen Brandt Brooks "
    "Burke Butler Carter Clarke Collins Cooper Craig Crosby Curtis Dalton Dawson Dixon Doyle "
    "Drake Dunn Ellis Evans Farmer Fischer Fleming Fletcher Foster Fraser Garner Gibson Gordon "
    "Graham Grant Griffin Hansen Harper Hayes Hoffman Holmes Hughes Jansen Jensen Keller Kemp "
    "Kramer Lambert Lawson Lindgren Mason Mercer Meyer Miller Morgan Morris Murray Nolan Norris "
    "Olsen Osborne Page Palmer Parker Porter Quinn Ramsey Reed Richter Rogers Russell Sawyer "
    "Schmidt Sharp Shaw Sutton Tanner Thorne Tucker Turner Vaughn Wagner Walsh Warner Webb Weber "
    "Wells Whitman Wright Young"
).split()

CITIES = (
    "Accra Ankara Athens Bangkok Beirut Bergen Berlin Bogota Bombay Boston Bristol Brussels Cairo "
    "Calgary Caracas Chicago Dakar Dallas Delhi Denver Dublin Durban Florence Geneva Genoa Ghent "
    "Glasgow Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta Kiev Krakow Lagos Leeds Lima "
    "Lisbon London Lyon Madrid Malaga Manila Marseille Memphis Milan Montreal Moscow Munich "
    "Nairobi Naples Osaka Oslo Ottawa Oxford Palermo Paris Perth Porto Prague Quito Riga Rome "
    "Rotterdam Salzburg Santiago Seattle Seoul Seville Stockholm Sydney Tampa Tehran Tokyo "
    "Toronto Tunis Turin Valencia Venice Verona Vienna Warsaw York Zagreb Zurich"
).split()

PROFESSIONS = (
    "actor architect astronomer banker barber biologist botanist builder butcher carpenter "
    "chemist clerk composer cook dancer dentist designer diver driver editor engineer fisher "
    "florist gardener geologist glazier guard hunter inspector jeweller journalist judge lawyer "
    "librarian mechanic miner musician nurse painter pharmacist philosopher photographer "
    "physicist pilot plumber poet potter printer sailor sculptor shepherd singer soldier surgeon "
    "tailor teacher translator waiter weaver welder writer"
).split()

INSTRUMENTS = (
    "accordion banjo bassoon bugle cello clarinet cornet dulcimer fiddle flute gong guitar "
    "harmonica harpsichord kazoo lute lyre mandolin marimba oboe piano piccolo recorder saxophone "
    "sitar tambourine timpani triangle trombone trumpet tuba ukulele viola violin xylophone "
    "zither"
).split()

TOPICS = (
    "airports algebra almanacs ants archery asteroids auctions avalanches bakeries ballads "
    "balloons bandages banking barometers batteries bees beetles bicycles botany bridges "
    "butterflies calendars camels canals carnivals castles caves ceramics chemistry chess clocks "
    "coins comets compasses coral corn crafts cranes crickets cyclones dams deserts dolphins "
    "dreams earthquakes eclipses elections elevators engines falcons fashion ferns ferries "
    "festivals fireworks floods fossils fountains galaxies gardens geometry geysers glaciers "
    "grammar gravity gymnastics harbors harvests hedgehogs helicopters horses hurricanes icebergs "
    "insurance islands jazz jungles kites knitting lanterns lemurs lighthouses lizards locks "
    "logic looms magnets mammoths maps marathons medals meteors mirrors monsoons mosaics motors "
    "mountains museums mushrooms myths navigation nebulae oceans octopuses opera orchards orchids "
    "origami owls painting paper parades parrots passports pendulums penguins perfumes planets "
    "plumbing poetry pottery pulleys puppets pyramids quarries radar railways rainbows reefs "
    "rivers robots rockets sailing satellites sculpture seals sharks shoes silk skating soap "
    "sonnets spices spiders stamps storms subways sundials surfing swamps taxes telescopes tennis "
    "theatres tides tigers tornadoes towers toys tractors trains tunnels turbines turtles "
    "vaccines valleys violins volcanoes waltzes wasps waterfalls weaving whales windmills wolves "
    "wrestling yachts zebras zinc"
).split()

FILLER = (
    "The weather was mild that week.",
    "Nobody had expected a reply so soon.",
    "The old road runs along the water.",
    "Most shops close before six in the evening.",
    "A new roof was put on the hall last year.",
    "The meeting began with a long list of questions.",
    "Visitors are asked to leave their bags at the door.",
    "Some of the letters were never opened.",
    "The train was late again on Monday.",
    "There is a small market behind the station.",
    "Few people remember how the custom began.",
    "The second edition has more pictures than the first.",
    "It rained for most of the afternoon.",
    "The room was painted white and had one chair.",
    "Everyone agreed to meet again in the spring.",
    "The path is closed when the wind is high.",
    "Tea was served in the room upstairs.",
    "The keys hang on a nail beside the stairs.",
    "An earlier report had come to the same result.",
    "The lights go out at ten.",
    "Children may enter free of charge.",
    "The price has not changed for many years.",
    "No one could say who had built the wall.",
    "The music stopped and the guests went home.",
)
