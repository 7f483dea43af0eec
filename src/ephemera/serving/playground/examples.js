// Prompts in the templates that the shipped networks were trained on, so that a first run shows them at work.

export const EXAMPLES = [
  {
    name: "Question",
    prompt: "Give a short answer of the following question. Output only the answer.\n\nQuestion: who wrote the origin of species?\n\nAnswer:",
  },
  {
    name: "Summary",
    prompt: "Summarize the following news article in one concise sentence.\n\nArticle:\n\nVolunteers in the coastal town of Wrexby have finished "
      + "rebuilding the wooden pier that was destroyed by a storm two winters ago. More than three hundred people gave their time, and the timber "
      + "was paid for by a sale of engraved planks. The mayor said that the first boat trips would start from the pier in May.\n\nSummary:",
  },
  {
    name: "Instruction",
    prompt: "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
      + "### Instruction:\nExplain in one sentence why the sea is salty.\n\n### Response:",
  },
];
