"""MIRA: mixtures of adapters, by keys that are learned after the fact (arXiv 2512.00940).

In the order of the paper:

    look         what is seen of an input beforehand, and what a head reads beside
    recall       how an input recalls its mixture: query, key, coefficients
    read         other readings: a query that settles first, a decoder over the ranks
    count        what consolidation counts of a task's images
    keys         keys in closed form, as mean queries, or at random
    learn        keys that learn by gradient (stage 2)
    protect      what learning may not change
    inventory    what is known before consolidation: what is new, what was counted
    consolidate  what consolidation does, step by step
    state        what the store holds of it, and a version read from there
    measure      what a memory is worth, beside other ways to read it
    method       the verbs: `Mira`
    attached     a version as a module
    forget       keys and head of a memory that some of its adapters leave
    recalled     the adapter that is recalled, as a PEFT directory
    explain      why an input is recognised as what it is
    maps         the pictures of a report

Over a language model:

    prompts      the memory of prompts: `PromptMemory`
    moments      what is known of prompts, and the keys that are solved from it
    ask          how what is seen meets keys, of which a task may have several
    tokens       the weights of single tokens, as they pass
    refine       keys that learn on from those in closed form
    collection   LoRA of others, and their example prompts, as they come in
    cost         what the weights cost, for a plan

Where the paper is silent, or where our trials found better, the default is ours and the paper's
form is an option: keys in closed form (`consolidate.keys: random` with `epochs`), an analytic head
per task (`head.kind: shared`, `head.scope: shared`), one early look for all blocks
(`memory.scope: block`), softmax (`memory.separation: affine`).
"""
