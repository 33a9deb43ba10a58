"""Train the classifier behind bench/measure/frechet.py on Fashion-MNIST, on CPU, and store the features' statistics.

    python bench/models/fashion-classifier/train_fashion_classifier.py FOLDER [EPOCHS] [DATA]

Debian's package dataset-fashion-mnist holds the data.  AdamW, one-cycle learning rate, flips and one-pixel shifts.
FOLDER gets classifier.fp16.safetensors, training.json, real.safetensors (of all 70,000 images, by the fp16 weights) and
real-features.safetensors: those of the first 2,000 test images, in fp16.
"""
import json, os, sys, time
from pathlib import Path
import torch, torch.nn.functional as F
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from bench.fashion_images import ROOT, images as load
from safetensors.torch import save_file
from bench.measure.frechet import Classifier, Statistics, class_accuracy, features, frechet_distance

out = Path(sys.argv[1]); epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 6
root = Path(sys.argv[3]) if len(sys.argv) > 3 else ROOT
out.mkdir(parents=True, exist_ok=True)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1"))); torch.manual_seed(0)
images, labels = load(root, "train"); test_images, test_labels = load(root, "t10k")
model = Classifier().to(memory_format=torch.channels_last)
print("params k", sum(p.numel() for p in model.parameters())/1e3, flush=True)
B = 128; steps = epochs*(len(images)//B)
opt = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=4e-3, total_steps=steps, pct_start=0.2)
start = time.time(); step = 0; run = 0.0
for epoch in range(epochs):
    perm = torch.randperm(len(images))
    for idx in perm[:len(perm)//B*B].view(-1, B):
        x = images[idx]
        if torch.rand(()) < 0.5: x = x.flip(3)
        dy, dx = torch.randint(-1, 2, (2,)).tolist()     # background is -1: shift over a margin of it
        x = F.pad(x, (1, 1, 1, 1), value=-1.0)[:, :, 1+dy:29+dy, 1+dx:29+dx]
        loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), labels[idx], label_smoothing=0.05)
        opt.zero_grad(set_to_none=True); loss.backward(); opt.step(); schedule.step(); step += 1
        run = loss.item() if step == 1 else 0.98*run+0.02*loss.item()
        if step % 100 == 0: print(f"epoch {epoch} step {step} loss {run:.4f} {step*B/(time.time()-start):.0f} img/s", flush=True)
    model.eval(); found = class_accuracy(features(test_images, model), test_labels, model); model.train()
    print(f"epoch {epoch} test accuracy {found:.4f}", flush=True)
minutes = (time.time()-start)/60
model.save(out); model = Classifier.load(out)            # judged as stored
trained, tested = features(images, model), features(test_images, model)
Statistics.of(torch.cat([trained, tested])).save(out/"real.safetensors")
save_file({"features": tested[:2000].half()}, out/"real-features.safetensors")
result = {"epochs": epochs, "steps": step, "images": step*B, "minutes": round(minutes, 1), "loss": run,
    "test_accuracy": class_accuracy(tested, test_labels, model), "train_accuracy": class_accuracy(trained, labels, model),
    "frechet_test_to_train": frechet_distance(tested, trained)}
(out/"training.json").write_text(json.dumps(result, indent=2)+"\n")
print("done", result, flush=True)
