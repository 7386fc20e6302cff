"""A stand-in for gcloud: refuses what is not documented, records, and plays a script.

STANDIN is a directory: `calls.jsonl` is what was called; `answers.json`, where there is
one, maps the beginning of a command to what its calls give, one after the other: an
exit status or a text to print. The last is given again.
"""

import json
import os
import pathlib
import sys

PLACE = pathlib.Path(os.environ["STANDIN"])
TABLE = json.loads((pathlib.Path(__file__).parent / "gcloud_flags.json").read_text())


def parse(words):
  """Returns the command, what follows it, and its flags; ends if it is unknown."""
  length = next(
    (n for n in range(len(words), 0, -1) if " ".join(words[:n]) in TABLE["commands"]), 0
  )
  command = " ".join(words[:length])
  if not length:
    sys.exit(f"gcloud: no such command: {words}")
  known = TABLE["commands"][command]
  flags, others = {}, []
  for word in words[length:]:
    if not word.startswith("--"):
      others.append(word)
      continue
    name, equals, value = word[2:].partition("=")
    if name not in (*known["flags"], *TABLE["everywhere"]):
      sys.exit(f"gcloud {command}: no such flag: --{name}")
    flags[name] = value if equals else True
  for name in known.get("required", ()):
    if name not in flags:
      sys.exit(f"gcloud {command}: --{name} is missing")
  return command, others, flags


def answer(command):
  """Returns what this call of a command is to give."""
  path = PLACE / "answers.json"
  answers = json.loads(path.read_text()) if path.exists() else {}
  given = answers.get(command, [0])
  if len(given) > 1:
    answers[command] = given[1:]
    path.write_text(json.dumps(answers))
  return given[0]


if __name__ == "__main__":
  command, others, flags = parse(sys.argv[1:])
  with open(PLACE / "calls.jsonl", "a") as file:
    file.write(json.dumps({"command": command, "words": others, "flags": flags}) + "\n")
  if command.endswith("ssh") and "job.sh" in flags.get("command", ""):
    command += " job"
  given = answer(command)
  if isinstance(given, str):
    print(given)
  else:
    sys.exit(given)
