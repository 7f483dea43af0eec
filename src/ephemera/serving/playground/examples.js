// Prompts in the templates that the shipped networks were trained on, so that a first run shows them at work.

export const EXAMPLES = [
  {
    name: "Question",
    prompt: "Give a short answer of the following question. Output only the answer.\n\nQuestion: who wrote the origin of species?\n\nAnswer:",
  },
  {
    name: "Passage",
    prompt: "You are given a passage and a question.\n\nAnswer with the exact text span from the passage. Output ONLY the answer span.\n\n"
      + "Passage:\n\nThe village of Harrowmere lies at the mouth of the River Tarn, where a ferry has carried passengers across the estuary since 1742. "
      + "The present boat, the Marigold, was built in 1988 and takes up to sixty people.\n\nQuestion:\n\nWhen was the Marigold built?\n\nAnswer:",
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
