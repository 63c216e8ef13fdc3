"""Names of the providers, cases and targets of the step suite, and their words on the page."""

HUGGING_FACE = "hugging_face_ce"
TWO_BACKWARD = "two_backward_loop"
CE = "fusedacl_ce"
ACL = "fusedacl_acl"
COMPILED = "fusedacl_ce_compiled"
ACL_TRAINER, UNGATED, MONITORED = "acl_trainer", "acl_trainer_ungated", "acl_trainer_monitored"
WORDS = {
    CE: "fusedacl, CE",
    HUGGING_FACE: "Hugging Face Trainer, CE",
    "fusedacl_scl": "fusedacl, CE+SCL",
    "fusedacl_acl_ungated": "fusedacl, ACL without the gate",
    ACL: "fusedacl, ACL-Grad, all parameters (exact)",
    "fusedacl_acl_top2": "fusedacl, ACL-Grad, top:2",
    "fusedacl_acl_head": "fusedacl, ACL-Grad, head",
    TWO_BACKWARD: "a loop by hand: two backward passes, cosine of the flat gradients",
    "deepspeed_ce": "fusedacl, CE, DeepSpeed with one process",
    "deepspeed_acl": "fusedacl, ACL-Grad, DeepSpeed with one process",
    COMPILED: "fusedacl, CE, torch_compile",
    ACL_TRAINER: "ACLTrainer, ACL-Grad, all parameters (exact)",
    UNGATED: "ACLTrainer, ACL without the gate",
    MONITORED: "ACLTrainer, ACL without the gate, AngleMonitor in every step",
}
# Targets: words, two providers, and the largest ratio of the first one's time to the second one's.
BARS = (
    ("exact gate over CE", ACL, CE, 1.75),
    ("gate on the last 2 layers over CE", "fusedacl_acl_top2", CE, 1.25),
    ("gate on the representation over CE", "fusedacl_acl_head", CE, 1.05),
    ("CE under DeepSpeed over local", "deepspeed_ce", CE, 1.15),
    ("exact gate under DeepSpeed over local", "deepspeed_acl", ACL, 1.15),
    ("exact gate, ACLTrainer over ours", ACL_TRAINER, ACL, 1.05),
)
# The largest ratio of the time with an AngleMonitor, which measures every so many steps, to that
# without: by the time of a step that it measures.
MONITOR_EVERY, MAX_MONITORED = 50, 1.02
CACHED_BATCH = "cached"
CASES = ("minilm", "bert-base", CACHED_BATCH)
# The providers of the case CACHED_BATCH.
ONE_CHUNK, CACHED, ONE_SHOT = "one_chunk", "cached_batch", "one_shot"
CACHED_WORDS = {
    ONE_CHUNK: "one chunk's step",
    CACHED: "cached batch",
    ONE_SHOT: "the whole batch in one forward pass",
}
