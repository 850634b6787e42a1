"""Write a seeded parallel corpus, English-German or English-French, from translations in libraries.

``python scripts/write_corpus.py --target de --out FOLDER`` writes ``train.en``, ``train.de``,
``valid.en``, ``valid.de``, ``test.en`` and ``test.de``: raw text, one sentence a line, UTF-8.

Where the text comes from. Dates, times, durations, amounts of money, measures, percentages, lists,
territories and languages are CLDR's, through ``babel``; spelled-out numbers are ``num2words``'.
They fill the slots of the sentence frames below, written by hand in all three languages, together
with some nouns. German verbs take their places and particles, nouns their cases, tens come after
units (*vierundzwanzig*); French has agreement, elision, contraction and *quatre-vingt-dix*. What
the sentences say is left to chance: they are meant to be correct language, not to be likely.

What is changed in the libraries' text: CLDR's non-breaking and narrow spaces become plain spaces,
the typographic apostrophe the plain one, and the first of a month in French is *1er*.

What is guaranteed. A seed defines one endless stream of sentences, each in all three languages; a
sentence that has under 5 or over 25 tokens in one of them, or repeats an earlier one in one of
them, is dropped. The split of a sentence is a function of the SHA-256 hash of its English text, and
each file holds the first sentences of the stream that belong to its split. Therefore

* no two lines of the corpus have the same source or the same target, in one split or in two;
* a source is in the same split for every seed, every size and both targets;
* a larger split starts with the lines of the smaller one, and the other splits stay as they are;
* the English side is the same for both targets;
* nothing depends on the date, the locale or ``PYTHONHASHSEED``, only on the arguments and on the
  versions of this file, of ``babel`` (CLDR) and of ``num2words``.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import hashlib
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

try:
    from babel import Locale
    from babel.dates import format_date, format_time, format_timedelta
    from babel.lists import format_list
    from babel.numbers import format_currency, format_decimal, get_currency_name
    from babel.units import format_unit
    from num2words import num2words
except ModuleNotFoundError as missing:
    sys.exit(f'write_corpus.py: {missing.name} is missing: pip install "fairseq-softtopk[examples]"')

# ------------------------------------------------------------------------------------ settings

SOURCE = "en"
TARGETS = ("de", "fr")
LANGUAGES = (SOURCE, *TARGETS)

# Of 20 hash values one goes to test, one to valid, the others to train. The first 115,000 or so
# sentences of a stream, which come easily, hold what the limits allow.
BUCKETS = 20
SPLIT_OF_BUCKET = {0: "test", 1: "valid"}
DEFAULT_SIZES = {"train": 8000, "valid": 500, "test": 500}
LIMITS = {"train": 100_000, "valid": 5_000, "test": 5_000}
PATIENCE = 10_000  # sentences in a row that bring nothing new, before the stream counts as dry

SHORTEST, LONGEST = 5, 25  # tokens
TOKEN = re.compile(r"\w+|[^\w\s]")

SPELLED = 0.65  # chance that a number under 1,000 is written in words
DECIMAL = 0.3  # chance that a measure or an amount in figures has decimals

# ---------------------------------------------------------------------------------------- data

# One row a noun: English, German, French, and its gender in French (for a person: its gender).
NOUNS = {
    "person": """
        Anna            | Anna                 | Anna              | f
        Laura           | Laura                | Laura             | f
        Julia           | Julia                | Julia             | f
        Thomas          | Thomas               | Thomas            | m
        Martin          | Martin               | Martin            | m
        Daniel          | Daniel               | Daniel            | m
        my sister       | meine Schwester      | ma sœur           | f
        my brother      | mein Bruder          | mon frère         | m
        my grandmother  | meine Großmutter     | ma grand-mère     | f
        my uncle        | mein Onkel           | mon oncle         | m
        our daughter    | unsere Tochter       | notre fille       | f
        our teacher     | unser Lehrer         | notre professeur  | m
        the doctor      | der Arzt             | le médecin        | m
        the mayor       | der Bürgermeister    | le maire          | m
        the nurse       | die Krankenschwester | l'infirmière      | f
        the actress     | die Schauspielerin   | l'actrice         | f
        """,
    "event": """
        the meeting     | die Sitzung          | la réunion        | f
        the concert     | das Konzert          | le concert        | m
        the exhibition  | die Ausstellung      | l'exposition      | f
        the course      | der Kurs             | le cours          | m
        the conference  | die Konferenz        | la conférence     | f
        the match       | das Spiel            | le match          | m
        the exam        | die Prüfung          | l'examen          | m
        the talk        | der Vortrag          | l'exposé          | m
        the wedding     | die Hochzeit         | le mariage        | m
        the competition | der Wettbewerb       | le concours       | m
        the reception   | der Empfang          | la réception      | f
        """,
    "vehicle": """
        the train       | der Zug              | le train          | m
        the night train | der Nachtzug         | le train de nuit  | m
        the bus         | der Bus              | le bus            | m
        the coach       | der Reisebus         | le car            | m
        the shuttle     | der Pendelbus        | la navette        | f
        the ferry       | die Fähre            | le ferry          | m
        the ship        | das Schiff           | le bateau         | m
        """,
    "building": """
        the museum      | das Museum           | le musée          | m
        the station     | der Bahnhof          | la gare           | f
        the school      | die Schule           | l'école           | f
        the library     | die Bibliothek       | la bibliothèque   | f
        the hotel       | das Hotel            | l'hôtel           | m
        the hospital    | das Krankenhaus      | l'hôpital         | m
        the theater     | das Theater          | le théâtre        | m
        the factory     | die Fabrik           | l'usine           | f
        the university  | die Universität      | l'université      | f
        the town hall   | das Rathaus          | la mairie         | f
        the restaurant  | das Restaurant       | le restaurant     | m
        the pharmacy    | die Apotheke         | la pharmacie      | f
        the bank        | die Bank             | la banque         | f
        the pool        | das Schwimmbad       | la piscine        | f
        """,
    "monument": """
        the church      | die Kirche           | l'église          | f
        the castle      | das Schloss          | le château        | m
        the bridge      | die Brücke           | le pont           | m
        the tower       | der Turm             | la tour           | f
        the monastery   | das Kloster          | le monastère      | m
        the inn         | das Gasthaus         | l'auberge         | f
        the statue      | die Statue           | la statue         | f
        the fountain    | der Brunnen          | la fontaine       | f
        """,
    "text": """
        the novel       | der Roman            | le roman          | m
        the poem        | das Gedicht          | le poème          | m
        the report      | der Bericht          | le rapport        | m
        the article     | der Artikel          | l'article         | m
        the contract    | der Vertrag          | le contrat        | m
        the story       | die Geschichte       | l'histoire        | f
        the speech      | die Rede             | le discours       | m
        """,
    "item": """
        the bag         | die Tasche           | le sac            | m
        the car         | das Auto             | la voiture        | f
        the bicycle     | das Fahrrad          | le vélo           | m
        the table       | der Tisch            | la table          | f
        the chair       | der Stuhl            | la chaise         | f
        the lamp        | die Lampe            | la lampe          | f
        the coat        | der Mantel           | le manteau        | m
        the dress       | das Kleid            | la robe           | f
        the watch       | die Uhr              | la montre         | f
        the suitcase    | der Koffer           | la valise         | f
        the carpet      | der Teppich          | le tapis          | m
        the shirt       | das Hemd             | la chemise        | f
        the umbrella    | der Regenschirm      | le parapluie      | m
        the mirror      | der Spiegel          | le miroir         | m
        """,
    "food": """
        the flour       | das Mehl             | la farine         | f
        the sugar       | der Zucker           | le sucre          | m
        the butter      | die Butter           | le beurre         | m
        the rice        | der Reis             | le riz            | m
        the cheese      | der Käse             | le fromage        | m
        the coffee      | der Kaffee           | le café           | m
        the chocolate   | die Schokolade       | le chocolat       | m
        the salt        | das Salz             | le sel            | m
        """,
    "drink": """
        the water       | das Wasser           | l'eau             | f
        the milk        | die Milch            | le lait           | m
        the oil         | das Öl               | l'huile           | f
        the beer        | das Bier             | la bière          | f
        the wine        | der Wein             | le vin            | m
        the tea         | der Tee              | le thé            | m
        """,
}

# Colours of an item: English, German stem, French masculine, French feminine.
COLOURS = """
    black  | schwarz | noir   | noire
    white  | weiß    | blanc  | blanche
    red    | rot     | rouge  | rouge
    green  | grün    | vert   | verte
    blue   | blau    | bleu   | bleue
    yellow | gelb    | jaune  | jaune
    gray   | grau    | gris   | grise
    brown  | braun   | marron | marron
    """

# Countable nouns, in the plural: English, German, French, gender in French.
COUNTABLES = {
    "things": """
        books      | Bücher      | livres     | m
        letters    | Briefe      | lettres    | f
        chairs     | Stühle      | chaises    | f
        apples     | Äpfel       | pommes     | f
        bottles    | Flaschen    | bouteilles | f
        photos     | Fotos       | photos     | f
        flowers    | Blumen      | fleurs     | f
        newspapers | Zeitungen   | journaux   | m
        cups       | Tassen      | tasses     | f
        pens       | Stifte      | stylos     | m
        stamps     | Briefmarken | timbres    | m
        eggs       | Eier        | œufs       | m
        plates     | Teller      | assiettes  | f
        candles    | Kerzen      | bougies    | f
        """,
    "people": """
        visitors    | Besucher     | visiteurs    | m
        students    | Studenten    | étudiants    | m
        guests      | Gäste        | invités      | m
        children    | Kinder       | enfants      | m
        journalists | Journalisten | journalistes | m
        musicians   | Musiker      | musiciens    | m
        tourists    | Touristen    | touristes    | m
        workers     | Arbeiter     | ouvriers     | m
        """,
    "pages": "pages | Seiten | pages | f",
}

# CLDR's territories whose English name needs no article. The article of the name in French decides
# between "en" and "au", "de" and "du"; a German name has an article only where it is feminine.
FRENCH_FEMININE = "FR DE ES IT PL AT SE NO FI GR HU BE CH SK UA IE IS CN IN EG AU"
FRENCH_MASCULINE = "PT DK JP BR CA MX MA"
GERMAN_FEMININE = "CH SK UA"

# CLDR's languages. German names all end in "sch", so that "ins Französische" is regular.
LANGUAGE_CODES = "de en fr es it pt pl sv no fi da el hu nl ja zh ru tr"

CURRENCIES = "EUR USD GBP CHF JPY SEK NOK CZK CAD INR"

# What is feminine in French, for "vingt et une heures".
FRENCH_FEMININE_UNITS = "duration-minute duration-hour duration-week mass-tonne GBP SEK NOK CZK INR"


class Unit(NamedTuple):
    """A CLDR unit and the range of the numbers that are drawn for it."""

    name: str
    low: int
    high: int


# The days that a period has and its highest number, for "ago", "ahead" and "period".
PERIODS: dict[Literal["day", "week", "month", "year"], tuple[int, int]] = {
    "day": (1, 30),
    "week": (7, 12),
    "month": (30, 18),
    "year": (365, 40),
}

MEASURES = {
    "delay": [Unit("duration-minute", 2, 90), Unit("duration-hour", 2, 12)],
    "minutes": [Unit("duration-minute", 2, 90)],
    "period": [Unit(f"duration-{name}", 2, high) for name, (_, high) in PERIODS.items()],
    "years": [Unit("duration-year", 2, 95)],
    "distance": [Unit("length-kilometer", 2, 900)],
    "run": [Unit("length-kilometer", 2, 150)],
    "steps": [Unit("length-meter", 20, 900)],
    "height": [Unit("length-meter", 3, 200)],
    "width": [Unit("length-centimeter", 10, 250)],
    "weight": [Unit("mass-gram", 50, 900), Unit("mass-kilogram", 2, 50)],
    "tonnage": [Unit("mass-tonne", 20, 4000)],
    "volume": [Unit("volume-liter", 2, 60), Unit("volume-centiliter", 5, 90)],
    "area": [Unit("area-square-meter", 15, 400)],
    "temperature": [Unit("temperature-celsius", 2, 45)],
    "speed": [Unit("speed-kilometer-per-hour", 20, 300)],
    "energy": [Unit("energy-kilowatt-hour", 100, 9000)],
    "percent": [Unit("concentr-percent", 2, 99)],
}

# Patterns of babel.dates. What follows "on" in English, "am" in German, "le" in French.
DATE_PATTERNS = [
    {"en": "EEEE, MMMM d, y", "de": "EEEE, 'dem' d. MMMM y", "fr": "EEEE d MMMM y"},
    {"en": "MMMM d, y", "de": "d. MMMM y", "fr": "d MMMM y"},
    {"en": "d MMMM y", "de": "d. MMMM y", "fr": "d MMMM y"},
    {"en": "M/d/y", "de": "dd.MM.y", "fr": "dd/MM/y"},
    {"en": "EEEE, MMMM d", "de": "EEEE, 'dem' d. MMMM", "fr": "EEEE d MMMM"},
    {"en": "MMMM d", "de": "d. MMMM", "fr": "d MMMM"},
]
TIME_PATTERN = {"en": "h:mm a", "de": "H:mm 'Uhr'", "fr": "H 'h' mm"}
FIRST_DATE, LAST_DATE = datetime.date(1950, 1, 1), datetime.date(2030, 12, 31)

# The accusative and the dative of each German article and possessive.
GERMAN_CASES = {
    "der": ("den", "dem"),
    "die": ("die", "der"),
    "das": ("das", "dem"),
    "mein": ("meinen", "meinem"),
    "meine": ("meine", "meiner"),
    "unser": ("unseren", "unserem"),
    "unsere": ("unsere", "unserer"),
}

# What neighbouring words do to each other, applied in this order. French "onze" is not elided.
FRENCH_VOWEL = r"(?!onz)(?:[aeiouâéèêîôœAEIOUÉÎŒ]|huile|heure)"
CONTRACTIONS = {
    "en": [],
    "de": [
        (r"\b([AaIi])n dem\b", r"\1m"),
        (r"\b([Vv])on dem\b", r"\1om"),
        (r"\b([Zz])u dem\b", r"\1um"),
        (r"\b([Zz])u der\b", r"\1ur"),
    ],
    "fr": [
        (rf"\b([Ll]|[Dd]|[Qq]u)e (?={FRENCH_VOWEL})", r"\1'"),
        (rf"\b([Ll])a (?={FRENCH_VOWEL})", r"\1'"),
        (r"\b([Dd])e le ", r"\1u "),
        (r"\bà le ", "au "),
    ],
}

# English, German, French. A slot is named {slot}; a digit tells two slots of a kind apart; what
# follows a dot is a form of the slot's phrase. Forms of nouns: acc and dat (German cases), e (the
# ending of a French participle), he (the pronoun), bare (without article); of places: at, to, of.
FRAMES = """
{vehicle} leaves at {time} and arrives at {time.later}.
{vehicle} fährt um {time} ab und kommt um {time.later} an.
{vehicle} part à {time} et arrive à {time.later}.

{vehicle} from {place} arrived {delay} late.
{vehicle} {place.of} ist mit {delay} Verspätung angekommen.
{vehicle} {place.of} est arrivé{vehicle.e} avec {delay} de retard.

Because of the fog, {vehicle} left {delay} later than planned.
Wegen des Nebels ist {vehicle} {delay} später als geplant abgefahren.
À cause du brouillard, {vehicle} est parti{vehicle.e} {delay} plus tard que prévu.

When does {vehicle} leave for {place}, at {time} or at {time.later}?
Wann fährt {vehicle} {place.to} ab, um {time} oder um {time.later}?
Quand part {vehicle} pour {place}, à {time} ou à {time.later} ?

{vehicle} covers {distance} in {hours}.
{vehicle} legt {distance} in {hours} zurück.
{vehicle} parcourt {distance} en {hours}.

For the {ordinal} time, {person} missed {vehicle} to {place}.
Zum {ordinal}n Mal hat {person} {vehicle.acc} {place.to} verpasst.
Pour la {ordinal} fois, {person} a manqué {vehicle} pour {place}.

In {month}, the speed limit for {vehicle} was raised to {speed}.
Im {month} wurde die Höchstgeschwindigkeit für {vehicle.acc} auf {speed} erhöht.
En {month}, la vitesse maximale pour {vehicle} a été portée à {speed}.

{event} begins on {weekday} at {time} and lasts {hours}.
{event} beginnt am {weekday} um {time} und dauert {hours}.
{event} commence {weekday} à {time} et dure {hours}.

{event} will take place on {date}.
{event} findet am {date} statt.
{event} aura lieu le {date}.

{person} knows that {event} lasts {hours}.
{person} weiß, dass {event} {hours} dauert.
{person} sait que {event} dure {hours}.

{event} was canceled because only {people} had come.
{event} wurde abgesagt, weil nur {people} gekommen waren.
{event} a été annulé{event.e} parce que seuls {people} étaient venus.

{event} cost {money} more than planned.
{event} hat {money} mehr gekostet als geplant.
{event} a coûté {money} de plus que prévu.

More than {people} from {place} took part in {event}.
An {event.dat} haben mehr als {people} {place.of} teilgenommen.
Plus de {people} {place.of} ont participé à {event}.

Before {event}, {person} has to read {pages}.
Vor {event.dat} muss {person} {pages} lesen.
Avant {event}, {person} doit lire {pages}.

On {date}, {person} left for {place}.
Am {date} ist {person} {place.to} abgereist.
Le {date}, {person} est parti{person.e} {place.to}.

{person} has been living in {place} for {period}.
{person} lebt seit {period.dat} {place.at}.
{person} vit {place.at} depuis {period}.

{ago}, {person} moved from {place} to {place2}.
{ago} ist {person} {place.of} {place2.to} gezogen.
{ago}, {person} a déménagé {place.of} {place2.to}.

{person} says that {person.he} will arrive in {place} {ahead}.
{person} sagt, dass {person.he} {ahead} {place.at} ankommen wird.
{person} dit que {person.he} arrivera {place.at} {ahead}.

{person} was born in {place} in {month}.
{person} wurde im {month} {place.at} geboren.
{person} est né{person.e} {place.at} en {month}.

{person} has already lived in {tour}.
{person} hat schon {tour} gelebt.
{person} a déjà vécu {tour}.

{person} paid {money} for {item} in {place}.
{person} hat {place.at} {money} für {item.acc} bezahlt.
{person} a payé {money} pour {item} {place.at}.

{item} costs {money}, but {person} has only {money.less}.
{item} kostet {money}, aber {person} hat nur {money.less}.
{item} coûte {money}, mais {person} n'a que {money.less}.

Did {person} really pay {money} for {item}?
Hat {person} wirklich {money} für {item.acc} bezahlt?
Est-ce que {person} a vraiment payé {money} pour {item} ?

{person} would like to exchange {money} for {money.other}.
{person} möchte {money} in {money.other} umtauschen.
{person} voudrait changer {money} en {money.other}.

{person} bought {things} and {things2} in {place}.
{person} hat {place.at} {things} und {things2} gekauft.
{person} a acheté {things} et {things2} {place.at}.

Yesterday, {person} sold {item} because {person.he} needed {money}.
Gestern hat {person} {item.acc} verkauft, weil {person.he} {money} brauchte.
Hier, {person} a vendu {item} parce que {person.he} avait besoin de {money}.

{person} promised {person2} to return {item} {ahead}.
{person} hat {person2.dat} versprochen, {item.acc} {ahead} zurückzugeben.
{person} a promis à {person2} de rendre {item} {ahead}.

If {person} saves {money} a week, {person.he} can buy {item} {ahead}.
Wenn {person} {money} pro Woche spart, kann {person.he} {ahead} {item.acc} kaufen.
Si {person} économise {money} par semaine, {person.he} pourra acheter {item} {ahead}.

{item} weighs {weight} and is {width} wide.
{item} wiegt {weight} und ist {width} breit.
{item} pèse {weight} et mesure {width} de large.

{person} gave {person2} {things} on {date}.
{person} hat {person2.dat} am {date} {things} geschenkt.
{person} a offert {things} à {person2} le {date}.

{person} rents an apartment of {area} for {money} a month.
{person} mietet für {money} im Monat eine Wohnung mit {area.dat}.
{person} loue un appartement de {area} pour {money} par mois.

There are {people} in front of {building}.
Vor {building.dat} stehen {people}.
Il y a {people} devant {building}.

{building} was built in {year} and renovated in {year.later}.
{building} wurde im Jahr {year} gebaut und im Jahr {year.later} renoviert.
{building} a été construit{building.e} en {year} et rénové{building.e} en {year.later}.

{person} traveled to {place} with {people} in {year}.
{person} ist im Jahr {year} mit {people.dat} {place.to} gereist.
{person} est parti{person.e} {place.to} avec {people} en {year}.

{building} is closed on {weekday}s until {time}.
{building} ist {weekday.adverb} bis {time} geschlossen.
{building} est fermé{building.e} le {weekday} jusqu'à {time}.

{building} will remain closed until {month}.
{building} bleibt bis {month} geschlossen.
{building} restera fermé{building.e} jusqu'en {month}.

The distance between {building} and {monument} is {steps}.
Die Entfernung zwischen {building.dat} und {monument.dat} beträgt {steps}.
La distance entre {building} et {monument} est de {steps}.

It is {distance} from {monument} to {building}.
Von {monument.dat} bis zu {building.dat} sind es {distance}.
Il y a {distance} de {monument} à {building}.

Every year, {building} uses {energy} of electricity.
Jedes Jahr verbraucht {building} {energy} Strom.
Chaque année, {building} consomme {energy} d'électricité.

{person} has an office on the {floor} floor of {building}.
{person} hat in {building.dat} ein Büro im {floor}n Stock.
{person} a un bureau au {floor} étage de {building}.

{people} from {place} visited {monument} in {month}.
Im {month} haben {people} {place.of} {monument.acc} besucht.
En {month}, {people} {place.of} ont visité {monument}.

{monument} dates from the {century} century and is {height} high.
{monument} stammt aus dem {century}n Jahrhundert und ist {height} hoch.
{monument} date du {century} siècle et mesure {height} de haut.

In {year}, {monument} was sold to {person} for {money}.
Im Jahr {year} wurde {monument} für {money} an {person.acc} verkauft.
En {year}, {monument} a été vendu{monument.e} à {person} pour {money}.

On {weekday}, {person} got up at {time} and went to {building}.
Am {weekday} ist {person} um {time} aufgestanden und zu {building.dat} gegangen.
{weekday}, {person} s'est levé{person.e} à {time} et est allé{person.e} à {building}.

{person} has been waiting for {person2} for {minutes} in front of {building}.
{person} wartet seit {minutes} vor {building.dat} auf {person2.acc}.
{person} attend {person2} depuis {minutes} devant {building}.

{person} called {person2} at {time} and talked for {minutes}.
{person} hat {person2.acc} um {time} angerufen und {minutes} lang geredet.
{person} a appelé {person2} à {time} et a parlé pendant {minutes}.

{person} is tired because {person.he} slept only {hours}.
{person} ist müde, weil {person.he} nur {hours} geschlafen hat.
{person} est fatigué{person.e} parce que {person.he} n'a dormi que {hours}.

{person} is {years} older than {person2}.
{person} ist {years} älter als {person2}.
{person} a {years} de plus que {person2}.

{person} will be {years} old on {date}.
{person} wird am {date} {years} alt.
{person} aura {years} le {date}.

{person} has already run {run} this week.
{person} ist diese Woche schon {run} gelaufen.
{person} a déjà couru {run} cette semaine.

{person} is learning {language} and already speaks {language2}.
{person} lernt {language} und spricht schon {language2}.
{person} apprend le {language} et parle déjà {language2}.

At work, {person} speaks {languages}.
Bei der Arbeit spricht {person} {languages}.
Au travail, {person} parle {languages}.

{text} was translated from {language} into {language2} in {year}.
{text} wurde im Jahr {year} aus dem {language}en ins {language2}e übersetzt.
{text} a été traduit{text.e} de le {language} en {language2} en {year}.

{person} wrote {text} in {language} {ago}.
{person} hat {text.acc} {ago} auf {language} geschrieben.
{person} a écrit {text} en {language} {ago}.

{text} has {pages} and was published on {date}.
{text} hat {pages} und wurde am {date} veröffentlicht.
{text} compte {pages} et a été publié{text.e} le {date}.

In {text}, the {ordinal} section begins on page {page}.
In {text.dat} beginnt der {ordinal} Abschnitt auf Seite {page}.
Dans {text}, la {ordinal} section commence à la page {page}.

According to {text}, {percent} of the people in {place} speak {language}.
Laut {text.dat} sprechen {percent} der Menschen {place.at} {language}.
Selon {text}, {percent} des habitants {place.of} parlent {language}.

Only {percent} of the students in {place} passed the exam.
Nur {percent} der Studenten {place.at} haben die Prüfung bestanden.
Seulement {percent} des étudiants {place.at} ont réussi l'examen.

In {month}, the price of {food.bare} rose by {percent}.
Im {month} ist der Preis für {food.bare} um {percent} gestiegen.
En {month}, le prix de {food} a augmenté de {percent}.

In {year}, {place} exported {tonnage} of {food.bare}.
Im Jahr {year} hat {place} {tonnage} {food.bare} exportiert.
En {year}, {place} a exporté {tonnage} de {food.bare}.

For this recipe you need {weight} of {food.bare} and {volume} of {drink.bare}.
Für dieses Rezept braucht man {weight} {food.bare} und {volume} {drink.bare}.
Pour cette recette, il faut {weight} de {food.bare} et {volume} de {drink.bare}.

Add {weight} of {food.bare} and let the dough rest for {minutes}.
Geben Sie {weight} {food.bare} hinzu und lassen Sie den Teig {minutes} ruhen.
Ajoutez {weight} de {food.bare} et laissez reposer la pâte pendant {minutes}.

Please bring {things} and {weight} of {food.bare} by {weekday}.
Bringen Sie bitte bis {weekday} {things} und {weight} {food.bare} mit.
Apportez {things} et {weight} de {food.bare} d'ici {weekday}, s'il vous plaît.

{person} buys {volume} of {drink.bare} every week.
{person} kauft jede Woche {volume} {drink.bare}.
{person} achète {volume} de {drink.bare} par semaine.

On {weekday}, the temperature in {place} rose to {temperature}.
Am {weekday} ist die Temperatur {place.at} auf {temperature} gestiegen.
{weekday}, la température {place.at} est montée à {temperature}.

{sum.left} plus {sum.right} makes {sum.total}.
{sum.left} plus {sum.right} ergibt {sum.total}.
{sum.left} plus {sum.right} font {sum.total}.

If you subtract {sum.left} from {sum.total}, you get {sum.right}.
Wenn man {sum.left} von {sum.total} abzieht, erhält man {sum.right}.
Si l'on soustrait {sum.left} de {sum.total}, on obtient {sum.right}.
"""

# ------------------------------------------------------------------------- phrases and numbers


class Phrase(str):
    """A phrase in its basic form; other forms are attributes, for ``{slot.form}`` in a frame."""

    bare: str
    at: str  # of places

    def __new__(cls, text: str, bare: str = "", **forms: str) -> Phrase:
        """Make a phrase; ``bare``, what it is about, is the text itself unless given."""
        phrase = super().__new__(cls, text)
        phrase.__dict__.update(forms, bare=bare or text)
        return phrase


Meaning = dict[str, Phrase]  # by language
Slot = Callable[[random.Random], Meaning]


class Number(NamedTuple):
    """A number and whether it is written in words."""

    value: int | Decimal
    spelled: bool


def draw_number(rng: random.Random, low: int, high: int, decimals: int = 0) -> Number:
    """Draw a number from ``low`` to ``high``, in figures with up to ``decimals`` decimals."""
    value = rng.randint(low, high)
    while value > 100 and value % 100 == 1:  # German "hunderteins" would agree with its noun
        value = rng.randint(low, high)
    if value < 1000 and rng.random() < SPELLED:
        return Number(value, spelled=True)
    if decimals and rng.random() < DECIMAL:
        return Number(value + Decimal(rng.randrange(1, 10**decimals)).scaleb(-decimals), False)
    return Number(value, spelled=False)


@cache
def spell(value: int, lang: str, feminine: bool = False) -> str:
    """Write a cardinal in words; ``feminine`` is what it counts in French."""
    words: str = num2words(value, lang=lang)
    return f"{words}e" if feminine and lang == "fr" and words.endswith("un") else words


@cache
def spell_ordinal(value: int, lang: str) -> str:
    """Write an ordinal in words, in German in the nominative."""
    words: str = num2words(value, lang=lang, to="ordinal")
    return words


@cache
def spell_year(value: int, lang: str) -> str:
    """Write a year in words; it is an ordinal, so French *vingt* and *cent* take no *s*."""
    words: str = num2words(value, lang=lang, to="year")
    return re.sub(r"(vingt|cent)s$", r"\1", words) if lang == "fr" else words


def spell_out(text: str, number: Number, lang: str, feminine: bool = False) -> str:
    """Replace the figure in ``text`` by words if the number is to be spelled out."""
    if not number.spelled:
        return text
    figure = format_decimal(number.value, locale=lang)
    return text.replace(figure, spell(int(number.value), lang, feminine), 1)


def dative_plural(text: str) -> str:
    """Decline a German plural that ends the phrase."""
    return text if text.endswith(("n", "s")) else f"{text}n"


# --------------------------------------------------------------------------------------- slots


def rows(table: str) -> list[list[str]]:
    """Split a table above in rows of cells."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def german_cases(phrase: str) -> tuple[str, str]:
    """Decline a nominative: its accusative and its dative. A name stays as it is."""
    article, _, head = phrase.partition(" ")
    if not head:
        return phrase, phrase
    accusative, dative = GERMAN_CASES[article]
    weak = re.sub(r"^([a-zäöüß]+e) ", r"\1n ", head)  # der rote Stuhl, den roten Stuhl
    return f"{accusative} {head if accusative == article else weak}", f"{dative} {weak}"


def noun(english: str, german: str, french: str, gender: str) -> Meaning:
    """Make a noun phrase out of its nominatives and its gender in French."""
    feminine = gender == "f"
    accusative, dative = german_cases(german)
    return {
        "en": Phrase(english, english.removeprefix("the "), he="she" if feminine else "he"),
        "de": Phrase(
            german,
            german.split(" ", 1)[-1],
            acc=accusative,
            dat=dative,
            he="sie" if feminine else "er",
        ),
        "fr": Phrase(
            french,
            re.sub(r"^(le |la |l')", "", french),
            e="e" if feminine else "",
            he="elle" if feminine else "il",
        ),
    }


def colour(item: Sequence[str], colour_row: Sequence[str]) -> Meaning:
    """Put a colour to a noun with a definite article."""
    english, german, french, gender = item
    name, stem, masculine, feminine = colour_row
    return noun(
        english.replace("the ", f"the {name} "),
        german.replace(" ", f" {stem}e "),
        f"{french} {feminine if gender == 'f' else masculine}",
        gender,
    )


def territory(code: str) -> Meaning:
    """Make a country, with the prepositions of place, direction and origin that it takes."""
    names = {lang: Locale(lang).territories[code] for lang in LANGUAGES}
    german, french = names["de"], names["fr"]
    return {
        "en": Phrase(names["en"], at=names["en"]),
        "de": (
            Phrase(
                f"die {german}",
                at=f"in der {german}",
                to=f"in die {german}",
                of=f"aus der {german}",
            )
            if code in GERMAN_FEMININE.split()
            else Phrase(german, at=f"in {german}", to=f"nach {german}", of=f"aus {german}")
        ),
        "fr": (
            Phrase(f"la {french}", at=f"en {french}", to=f"en {french}", of=f"de {french}")
            if code in FRENCH_FEMININE.split()
            else Phrase(f"le {french}", at=f"au {french}", to=f"au {french}", of=f"du {french}")
        ),
    }


COLOUR_ROWS = rows(COLOURS)
ITEM_ROWS = rows(NOUNS["item"])
TERRITORIES = [territory(code) for code in f"{FRENCH_FEMININE} {FRENCH_MASCULINE}".split()]
LANGUAGE_NAMES = [
    {lang: Phrase(Locale(lang).languages[code]) for lang in LANGUAGES} for code in LANGUAGE_CODES.split()
]


def draw_noun(table: Sequence[Sequence[str]], rng: random.Random) -> Meaning:
    """Draw a noun."""
    return noun(*rng.choice(table))


def draw_item(rng: random.Random) -> Meaning:
    """Draw a thing that one buys, half of the time with its colour."""
    item = rng.choice(ITEM_ROWS)
    return colour(item, rng.choice(COLOUR_ROWS)) if rng.random() < 0.5 else noun(*item)


def draw_count(table: Sequence[Sequence[str]], rng: random.Random) -> Meaning:
    """Draw a number of things."""
    *names, gender = rng.choice(table)
    number = draw_number(rng, 2, 400)
    meaning = {}
    for lang, name in zip(LANGUAGES, names, strict=True):
        text = f"{format_decimal(number.value, locale=lang)} {name}"
        text = spell_out(text, number, lang, feminine=gender == "f")
        meaning[lang] = Phrase(text, name, dat=dative_plural(text))
    return meaning


def measure(number: Number, unit: str, lang: str) -> str:
    """Write a number of CLDR's units."""
    text = format_unit(number.value, unit, length="long", locale=lang)
    return spell_out(text, number, lang, feminine=unit in FRENCH_FEMININE_UNITS.split())


def draw_measure(units: Sequence[Unit], rng: random.Random) -> Meaning:
    """Draw a measure in one of the units."""
    name, low, high = rng.choice(units)
    number = draw_number(rng, low, high, decimals=0 if name.startswith("duration") else 1)
    texts = {lang: measure(number, name, lang) for lang in LANGUAGES}
    return {lang: Phrase(text, dat=dative_plural(text)) for lang, text in texts.items()}


def draw_hours(rng: random.Random) -> Meaning:
    """Draw a duration in hours, half of the time with minutes. German dative is as nominative."""
    hours, minutes = rng.randint(2, 12), rng.randint(2, 59)
    exact, spelled = rng.random() < 0.5, rng.random() < SPELLED
    meaning = {}
    for lang in LANGUAGES:
        parts = [measure(Number(hours, spelled), "duration-hour", lang)]
        if exact:
            parts.append(measure(Number(minutes, spelled), "duration-minute", lang))
        meaning[lang] = Phrase(format_list(parts, locale=lang))
    return meaning


def draw_distance_in_time(sign: int, rng: random.Random) -> Meaning:
    """Draw "three days ago" (``sign`` is -1) or "in three days" (1)."""
    unit = rng.choice(list(PERIODS))
    days, high = PERIODS[unit]
    number = draw_number(rng, 2, high)
    delta = datetime.timedelta(days=sign * days * int(number.value))
    feminine = f"duration-{unit}" in FRENCH_FEMININE_UNITS.split()
    meaning = {}
    for lang in LANGUAGES:
        text = format_timedelta(
            delta, granularity=unit, threshold=float("inf"), add_direction=True, locale=lang
        )
        meaning[lang] = Phrase(spell_out(text, number, lang, feminine))
    return meaning


def amount(number: Number, currency: str, lang: str) -> str:
    """Write an amount of money with the name of its currency."""
    whole = isinstance(number.value, int)
    text = format_currency(
        number.value,
        currency,
        format="#,##0" if whole else None,
        locale=lang,
        currency_digits=not whole,
        format_type="name",
    )
    return spell_out(text, number, lang, feminine=currency in FRENCH_FEMININE_UNITS.split())


def draw_money(rng: random.Random) -> Meaning:
    """Draw an amount of money, with a smaller one (``less``) and another currency (``other``)."""
    currency, other = rng.sample(CURRENCIES.split(), 2)
    number = draw_number(rng, 20, 1500, decimals=2)
    less = draw_number(rng, 2, int(number.value) - 1)
    return {
        lang: Phrase(
            amount(number, currency, lang),
            less=amount(less, currency, lang),
            other=get_currency_name(other, count=2, locale=lang),
        )
        for lang in LANGUAGES
    }


def draw_day(rng: random.Random) -> datetime.date:
    """Draw a day."""
    return FIRST_DATE + datetime.timedelta(rng.randrange((LAST_DATE - FIRST_DATE).days + 1))


def draw_date(rng: random.Random) -> Meaning:
    """Draw a date, in one of several formats."""
    day = draw_day(rng)
    if rng.random() < 0.2:
        month = {lang: format_date(day, "MMMM", locale=lang) for lang in LANGUAGES}
        french = "premier" if day.day == 1 else spell(day.day, "fr")
        return {
            "en": Phrase(f"the {spell_ordinal(day.day, 'en')} of {month['en']}"),
            "de": Phrase(f"{spell_ordinal(day.day, 'de')}n {month['de']}"),
            "fr": Phrase(f"{french} {month['fr']}"),
        }
    patterns = dict(rng.choice(DATE_PATTERNS))
    if day.day == 1:
        patterns["fr"] = patterns["fr"].replace("d MMMM", "d'er' MMMM")
    return {lang: Phrase(format_date(day, patterns[lang], locale=lang)) for lang in LANGUAGES}


def draw_month(rng: random.Random) -> Meaning:
    """Draw a month, often with its year."""
    day = draw_day(rng)
    pattern = "MMMM y" if rng.random() < 0.7 else "MMMM"
    return {lang: Phrase(format_date(day, pattern, locale=lang)) for lang in LANGUAGES}


def draw_weekday(rng: random.Random) -> Meaning:
    """Draw a day of the week."""
    day = FIRST_DATE + datetime.timedelta(rng.randrange(7))
    names = {lang: format_date(day, "EEEE", locale=lang) for lang in LANGUAGES}
    return {lang: Phrase(name, adverb=f"{name.lower()}s") for lang, name in names.items()}


def draw_time(rng: random.Random) -> Meaning:
    """Draw a time of the day, with a ``later`` one."""
    early = 5 * rng.randrange(60, 240)  # minutes: from 5:00 to 19:55
    late = early + 5 * rng.randint(3, 45)

    def clock(minutes: int, lang: str) -> str:
        pattern = TIME_PATTERN[lang]
        if lang == "fr" and minutes % 60 == 0:
            pattern = pattern.removesuffix(" mm")
        return format_time(datetime.time(*divmod(minutes, 60)), pattern, locale=lang)

    return {lang: Phrase(clock(early, lang), later=clock(late, lang)) for lang in LANGUAGES}


def draw_year(rng: random.Random) -> Meaning:
    """Draw a year, with a ``later`` one."""
    early = rng.randint(FIRST_DATE.year, LAST_DATE.year - 15)
    late = rng.randint(early + 1, LAST_DATE.year)
    write = spell_year if rng.random() < SPELLED / 2 else lambda year, lang: str(year)
    return {lang: Phrase(write(early, lang), later=write(late, lang)) for lang in LANGUAGES}


def draw_ordinal(low: int, high: int, rng: random.Random) -> Meaning:
    """Draw an ordinal."""
    value = rng.randint(low, high)
    return {lang: Phrase(spell_ordinal(value, lang)) for lang in LANGUAGES}


def draw_page(rng: random.Random) -> Meaning:
    """Draw the number of a page, in figures."""
    return dict.fromkeys(LANGUAGES, Phrase(str(rng.randint(2, 400))))


def draw_sum(rng: random.Random) -> Meaning:
    """Draw two numbers and their sum, in words."""
    left, right = rng.randint(2, 99), rng.randint(2, 99)
    return {
        lang: Phrase(
            spell(left + right, lang),
            left=spell(left, lang),
            right=spell(right, lang),
            total=spell(left + right, lang),
        )
        for lang in LANGUAGES
    }


def draw_languages(rng: random.Random) -> Meaning:
    """Draw two or three languages."""
    names = rng.sample(LANGUAGE_NAMES, rng.randint(2, 3))
    return {lang: Phrase(format_list([name[lang] for name in names], locale=lang)) for lang in LANGUAGES}


def draw_tour(rng: random.Random) -> Meaning:
    """Draw two or three countries, with the preposition "in"."""
    stops = rng.sample(TERRITORIES, rng.randint(2, 3))
    return {lang: Phrase(format_list([stop[lang].at for stop in stops], locale=lang)) for lang in LANGUAGES}


SLOTS: dict[str, Slot] = {
    **{name: partial(draw_noun, rows(table)) for name, table in NOUNS.items()},
    **{name: partial(draw_count, rows(table)) for name, table in COUNTABLES.items()},
    **{name: partial(draw_measure, units) for name, units in MEASURES.items()},
    "item": draw_item,
    "place": lambda rng: rng.choice(TERRITORIES),
    "language": lambda rng: rng.choice(LANGUAGE_NAMES),
    "languages": draw_languages,
    "tour": draw_tour,
    "date": draw_date,
    "month": draw_month,
    "weekday": draw_weekday,
    "time": draw_time,
    "year": draw_year,
    "hours": draw_hours,
    "ago": partial(draw_distance_in_time, -1),
    "ahead": partial(draw_distance_in_time, 1),
    "money": draw_money,
    "ordinal": partial(draw_ordinal, 2, 60),
    "floor": partial(draw_ordinal, 2, 40),
    "century": partial(draw_ordinal, 11, 20),
    "page": draw_page,
    "sum": draw_sum,
}

# ----------------------------------------------------------------------------------- sentences

Sentence = dict[str, str]  # by language


class Frame(NamedTuple):
    """A sentence with slots in each language, and the slots in the order of the English."""

    templates: dict[str, str]
    slots: tuple[str, ...]


def parse_frame(block: str) -> Frame:
    """Read the three lines of a frame."""
    templates = dict(zip(LANGUAGES, block.splitlines(), strict=True))
    slots = re.findall(r"\{(\w+)", templates[SOURCE])
    return Frame(templates, tuple(dict.fromkeys(slots)))


PARSED_FRAMES = [parse_frame(block) for block in FRAMES.strip().split("\n\n")]


def finish(text: str, lang: str) -> str:
    """Contract and elide, make spaces and apostrophes plain, begin with a capital."""
    text = re.sub(r"[\u00a0\u2009\u202f]", " ", text).replace("\u2019", "'")
    for pattern, replacement in CONTRACTIONS[lang]:
        text = re.sub(pattern, replacement, text)
    return text[0].upper() + text[1:]


def compose(frame: Frame, rng: random.Random) -> Sentence:
    """Fill the slots of a frame; two slots of a kind never get the same thing."""
    meanings: dict[str, Meaning] = {}
    for slot in frame.slots:
        taken = {meaning[SOURCE].bare for meaning in meanings.values()}
        draw = SLOTS[slot.rstrip("0123456789")]
        meaning = draw(rng)
        while meaning[SOURCE].bare in taken:
            meaning = draw(rng)
        meanings[slot] = meaning
    return {
        lang: finish(template.format_map({slot: meaning[lang] for slot, meaning in meanings.items()}), lang)
        for lang, template in frame.templates.items()
    }


def split_of(sentence: Sentence) -> str:
    """Name the split of a sentence, which is a function of its English text alone."""
    digest = hashlib.sha256(sentence[SOURCE].encode()).digest()
    return SPLIT_OF_BUCKET.get(int.from_bytes(digest, "big") % BUCKETS, "train")


def has_good_length(sentence: Sentence) -> bool:
    """Tell whether each language has 5 to 25 tokens: runs of letters or digits, punctuation."""
    return all(SHORTEST <= len(TOKEN.findall(text)) <= LONGEST for text in sentence.values())


def distinct_sentences(seed: int) -> Iterator[Sentence]:
    """Yield the stream of a seed: good sentences that repeat no line in any language.

    Raises:
        ValueError: If ``PATIENCE`` sentences in a row bring nothing new.
    """
    rng = random.Random(seed)
    seen: dict[str, set[str]] = {lang: set() for lang in LANGUAGES}
    stale = 0
    while stale < PATIENCE:
        sentence = compose(rng.choice(PARSED_FRAMES), rng)
        stale += 1
        if has_good_length(sentence) and not any(sentence[lang] in seen[lang] for lang in seen):
            for lang, text in sentence.items():
                seen[lang].add(text)
            stale = 0
            yield sentence
    raise ValueError(f"the frames give only {len(seen[SOURCE])} distinct sentences")


def draw_splits(sizes: dict[str, int], seed: int) -> dict[str, list[Sentence]]:
    """Take from the stream the first sentences of each split."""
    splits: dict[str, list[Sentence]] = {split: [] for split in sizes}
    stream = distinct_sentences(seed)
    while any(len(splits[split]) < size for split, size in sizes.items()):
        sentence = next(stream)
        split = split_of(sentence)
        if len(splits[split]) < sizes[split]:
            splits[split].append(sentence)
    return splits


# ---------------------------------------------------------------------------------------- files


def write_files(folder: Path, texts: dict[str, str]) -> None:
    """Write files that appear under their names only when all of them are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in texts:
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} is a folder")
    with tempfile.TemporaryDirectory(prefix=".corpus-", dir=folder) as unfinished:
        for name, text in texts.items():
            (Path(unfinished) / name).write_text(text, encoding="utf-8", newline="\n")
        for name in texts:
            os.replace(Path(unfinished) / name, folder / name)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message, without the usage before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole_number(low: int, high: int | None, text: str) -> int:
    """Read a whole number from ``low`` to ``high``."""
    if re.fullmatch(r"-?[0-9]+", text) and low <= int(text) and (high is None or int(text) <= high):
        return int(text)
    allowed = f"from {low} to {high}" if high is not None else f"that is at least {low}"
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {allowed}")


def folder_path(text: str) -> Path:
    """Read the path of a folder, or of nothing yet."""
    path = Path(text)
    if not text or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder or a name for a new one")
    return path


def make_parser() -> Parser:
    """Describe the command line."""
    parser = Parser(description="Write a seeded parallel corpus, from English.")
    parser.add_argument("--target", choices=TARGETS, required=True, help="target language")
    parser.add_argument(
        "--out",
        type=folder_path,
        required=True,
        metavar="FOLDER",
        help="folder of the six files, made if missing; files of these names are replaced",
    )
    for split, size in DEFAULT_SIZES.items():
        parser.add_argument(
            f"--{split}",
            type=partial(whole_number, 1, LIMITS[split]),
            default=size,
            metavar="PAIRS",
            help=f"sentence pairs of {split}, 1 to {LIMITS[split]} (default: {size})",
        )
    parser.add_argument(
        "--seed",
        type=partial(whole_number, 0, None),
        default=1,
        help="seed of the corpus, 0 or more (default: 1)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the corpus that the command line asks for."""
    parser = make_parser()
    args = parser.parse_args(argv)
    sizes = {split: getattr(args, split) for split in DEFAULT_SIZES}
    try:
        splits = draw_splits(sizes, args.seed)
        write_files(
            args.out,
            {
                f"{split}.{lang}": "".join(f"{sentence[lang]}\n" for sentence in sentences)
                for split, sentences in splits.items()
                for lang in (SOURCE, args.target)
            },
        )
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"argument --out: cannot write to {str(args.out)!r}: {error.strerror}")
    counts = ", ".join(f"{split} {size}" for split, size in sizes.items())
    print(f"wrote {SOURCE}-{args.target} pairs to {args.out}: {counts}")


if __name__ == "__main__":
    main()
