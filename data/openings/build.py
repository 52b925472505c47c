"""Rebuild openings.jsonl: python build.py. First words of texts of many kinds, for a model to go on from in its own way."""

import json
import random
from pathlib import Path

SEED = 20251125

SCIENCE = """gravity|friction|magnets|electric circuits|sound waves|light|heat|energy|chemical reactions|acids and bases|atoms|
molecules|the periodic table|metals|crystals|water|ice and steam|the water cycle|clouds|lightning|the seasons|the tides|
the Moon|the Sun|the planets|comets|stars|galaxies|earthquakes|volcanoes|rocks and minerals|fossils|soil|rivers|glaciers|
deserts|the ocean floor|coral reefs|rainforests|grasslands|food chains|photosynthesis|respiration|cells|bacteria|viruses|
fungi|seeds|roots and leaves|flowers and pollen|insects|spiders|fish|frogs|reptiles|birds|bats|whales|bears|camels|
the human heart|the lungs|digestion|bones and muscles|the brain|the eye|hearing|skin|blood|hormones|vitamins|sleep|vaccines|
genes|heredity|evolution|adaptation|extinction|ecosystems|pollution|recycling|solar power|wind turbines|engines|levers and
pulleys|telescopes|microscopes|computers|radio|batteries|plastics|measurement|the scientific method""".replace(
    "\n", " "
)
PLACES = """a small village by the sea|a mountain town|a large city|the edge of the forest|an old farm|a quiet island|the desert|
a busy harbor|a school in the country|a castle|the capital|a river valley|a railway station|a hospital|a market square|the north
of the country|a poor neighborhood|the suburbs""".replace("\n", " ")
PEOPLE = """a young girl named Anna|a boy called Tom|an old fisherman|two brothers|a tired teacher|a lonely king|a clever fox|a brown
dog|a small gray cat|a poor woodcutter|a retired soldier|a doctor and her son|three friends|a shy student|an inventor|a widow|
a baker and his wife|the captain of a ship|a nurse named Maria|a little bear|my grandmother|the new neighbor|a farmer|a young
painter|a detective""".replace("\n", " ")
NEWS = """The government|Police|The president|A court|Scientists|Rescue workers|The company|The team's coach|A local family|Students|
Doctors|The mayor|Voters|Officials|A study|Firefighters|The singer|Investors|Teachers|The army|Farmers|A judge|The airline|
The museum""".replace("\n", " ")
HISTORY = """the Roman Empire|ancient Egypt|the Middle Ages|the printing press|the Silk Road|the Industrial Revolution|the French
Revolution|the First World War|the Second World War|the Cold War|the American Civil War|the Renaissance|the railways|the
telephone|the discovery of penicillin|the exploration of the poles|the space race|colonialism|slavery|the voting rights of women|
the city of Rome|Japan|India|China|Brazil|Mexico|Kenya|Canada|Australia|Russia|Poland|Spain|the Ottoman Empire""".replace(
    "\n", " "
)
DAILY = """cooking rice|baking bread|growing tomatoes|choosing a bicycle|learning a language|training a dog|saving money|finding a job|
playing chess|painting a room|swimming|running|making new friends|moving house|writing a letter|reading aloud to children|
planning a trip|fixing a leaking tap|keeping bees|taking photographs|eating well|sleeping better|working from home|speaking in
public|taking care of an elderly parent|buying a used car|football|basketball|tennis|singing in a choir""".replace(
    "\n", " "
)

TEMPLATES = [
    (
        SCIENCE,
        """Question: What is {}|Question: Why do {}|Question: How does {}|Question: Which of these is true of {}|Question: A student wants to
know about {}.|Q: What can you tell me about {}?\\nA:|Explain {} in simple words.\\n\\n|{}: an introduction\\n\\n|In this lesson, we will learn
about {}.|Today our class studied {}. |Many people wonder about {}.|The most important fact about {} is that|Experiments
with {} have shown that|One common mistake about {} is|{} can be described as""",
    ),
    (
        HISTORY,
        """The history of {}|{} is|Question: When did {}|In the time of {},|Historians of {} disagree about|What was {} like?|A short guide
to {}\\n\\n|The people of that age, in the days of {},|The economy of {}|Few books about {} mention""",
    ),
    (
        PEOPLE,
        """Once upon a time there was {} who|There once lived {}|It was late in the evening when {}|"Where are you going?" asked {}.|
Nobody in the street knew that {}|Every morning, {}|On the first day of winter, {}|When I was young, {}|The letter said that {}|
In the end, {} had to choose.|{} sat down and began to cry.|That summer {} and the others|Question: Why was {}""",
    ),
    (
        PLACES,
        """The road led to {}.|We arrived at {} on a Tuesday|Nothing ever happened in {},|He had grown up in {},|Rain was falling on {}|
Visitors to {} will find|The last house in {} belonged to|Two men met in {} and""",
    ),
    (
        NEWS,
        """(Reuters) - {}|{} said on Monday that|{} announced on Thursday|LONDON - {}|WASHINGTON - {}|{} denied reports that|More than a hundred
people were hurt, {}|Breaking news: {}|In an interview, {}|{} will have to decide by Friday whether|A year after the accident, {}""",
    ),
    (
        DAILY,
        """How to get better at {}:\\n\\n1.|I have been {} for ten years, and|Dear Sir or Madam,\\n\\nI am writing about {}|Five tips for {}\\n\\n|
"Have you ever thought about {}?" she said.|My opinion on {}|The best book about {}|Review: {}|A beginner's guide to {}\\n\\n|
Question: Is {} good for|There are two ways of {}.|Hi everyone, I need some advice about {}.|The benefits of {}|She was not
interested in {},""",
    ),
]
BARE = """The|In|When|She|He|They|If you|There are|Although|One day|"I|After the war|According to|For example|My name is|What|Question:|
Passage:|Read the text and answer the question.\\n\\n|Chapter 1\\n\\n|Abstract\\n\\n|Introduction\\n\\n|Summary:|Title:|Dear diary,|Poem:\\n\\n|
Joke:|Recipe:|Interviewer:|Narrator:|Speech of the president:|True or false:""".replace("\n", "").split("|")


def openings() -> list[str]:
    """All openings, each once, in shuffled order."""
    found = [text.replace("\\n", "\n") for text in BARE]
    for topics, templates in TEMPLATES:
        for template in templates.replace("\n", " ").split("|"):
            for topic in topics.split("|"):
                text = template.strip(" ").replace("\\n", "\n").format(" ".join(topic.split()))
                found.append(text[0].upper() + text[1:])
    found = sorted(set(found))
    random.Random(SEED).shuffle(found)
    return found


if __name__ == "__main__":
    file = Path(__file__).parent / "openings.jsonl"
    file.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in openings()), encoding="utf-8"
    )
