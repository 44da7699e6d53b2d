"""The network of a Keras model, trained and timed in PyTorch: what `benchmark.py` measures ours against.

`describe` runs where Keras is, `TorchNetwork` where PyTorch is: in two processes, since each has its threads.
"""

import numpy as np

from mammo.base.files import InputError


def describe(model) -> list[tuple]:
    """List the layers of a Keras classifier of images, nested models unfolded, in the order of computation.

    Each is (kind, configuration, weights, places of its inputs in this list, the network's input being place 0).
    """
    import keras

    steps, places = [("Input", {}, [], [])], {}

    def unfold(model, inputs):
        places.update(zip(map(id, model.inputs), inputs, strict=True))
        for layer in model.layers:
            if isinstance(layer, keras.layers.InputLayer):
                continue
            node = layer._inbound_nodes[-1]
            inputs = [places[id(tensor)] for tensor in node.input_tensors]
            if isinstance(layer, keras.Model):
                unfold(layer, inputs)
                place = places[id(layer.outputs[0])]
            else:
                place = len(steps)
                steps.append((type(layer).__name__, layer.get_config(), layer.get_weights(), inputs))
            places[id(node.output_tensors[0])] = place

    unfold(model, [0])
    return steps


class TorchNetwork:
    """The network of `describe` as a torch module, channels last, on `device`, with Adam at `rate`.

    Images and labels are those of Keras: float32 (N, H, W, C) and one-hot (N, classes).
    """

    def __init__(self, steps, threads, device="cpu", rate=1e-5):
        import torch

        torch.set_num_threads(threads)
        self.torch, self.device = torch, device
        modules, graph, self._decay = torch.nn.ModuleDict(), torch.fx.Graph(), {}
        values, padding = [graph.placeholder("images")], {}
        for place, (kind, config, weights, inputs) in enumerate(steps[1:], start=1):
            if kind == "ZeroPadding2D":  # torch pads within the layer that follows
                padding[place] = config["padding"]
                values.append(values[inputs[0]])
                continue
            if kind == "Add":
                values.append(graph.call_function(torch.add, tuple(values[i] for i in inputs)))
                continue
            modules[str(place)] = self._module(kind, config, weights, padding.get(inputs[0], ((0, 0), (0, 0))))
            values.append(graph.call_module(str(place), (values[inputs[0]],)))
        graph.output(values[-1])
        self.net = torch.fx.GraphModule(modules, graph).to(device, memory_format=torch.channels_last)
        groups = {}  # torch halves the penalty that Keras adds: its decay is the gradient's factor
        for parameter in self.net.parameters():
            groups.setdefault(2 * self._decay.get(parameter, 0.0), []).append(parameter)
        self.optimizer = torch.optim.Adam(
            [{"params": params, "weight_decay": decay} for decay, params in groups.items()], lr=rate, fused=True
        )

    def _module(self, kind, config, weights, padding):
        """One layer; a classifier ends in logits, as torch has it."""
        torch, nn = self.torch, self.torch.nn
        tensors = [torch.from_numpy(weight.copy()) for weight in weights]
        if kind == "Conv2D":
            kernel = tensors[0].permute(3, 2, 0, 1)
            size, strides = config["kernel_size"], config["strides"]
            pads = _pads(config["padding"], size, strides, padding)
            module = nn.Conv2d(kernel.shape[1], kernel.shape[0], size, strides, pads, bias=config["use_bias"])
            tensors[0] = kernel
        elif kind == "Dense":
            module = nn.Linear(*tensors[0].shape, bias=config["use_bias"])
            tensors[0] = tensors[0].T
        elif kind == "BatchNormalization":
            module = nn.BatchNorm2d(len(tensors[0]), config["epsilon"], 1 - config["momentum"])
            module.running_mean.copy_(tensors[2])
            module.running_var.copy_(tensors[3])
        elif kind == "MaxPooling2D":
            size, strides = config["pool_size"], config["strides"]
            return nn.MaxPool2d(size, strides, _pads(config["padding"], size, strides, padding))
        elif kind == "GlobalAveragePooling2D":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        elif kind == "Dropout":
            return nn.Dropout(config["rate"])
        elif kind in ("Activation", "ReLU") and config.get("activation", "relu") == "relu":
            return nn.ReLU(inplace=True)
        else:
            raise InputError(f"in PyTorch: Expected layers that it knows. Received {kind}")
        with torch.no_grad():
            for parameter, tensor in zip(module.parameters(), tensors, strict=False):
                parameter.copy_(tensor)
        if penalty := config.get("kernel_regularizer"):
            self._decay[module.weight] = float(penalty["config"]["l2"])
        return nn.Sequential(module, nn.ReLU(inplace=True)) if config.get("activation") == "relu" else module

    def _images(self, x):
        return self.torch.from_numpy(x).permute(0, 3, 1, 2).to(self.device)  # the memory stays channels last

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Probabilities (N, classes)."""
        self.net.eval()
        with self.torch.inference_mode():
            return self.net(self._images(x)).softmax(1).cpu().numpy()

    def train(self, x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
        """One step; its cross-entropy before it, without the L2 penalty. weights: (N,), none of them 0."""
        self.net.train()
        y, weights = (self.torch.from_numpy(v).to(self.device) for v in (y, weights))
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.torch.nn.functional.cross_entropy(self.net(self._images(x)), y, reduction="none")
        loss = (losses * weights).mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def _pads(rule, size, strides, explicit):
    """(rows, columns) of zeros on every side; torch has no other."""
    pads = []
    for k, stride, (before, after) in zip(size, strides, explicit, strict=True):
        if rule == "same" and k > 1:
            before = after = k // 2
        if before != after or (rule == "same" and k > 1 and (stride > 1 or k % 2 == 0)):
            raise InputError("in PyTorch: Expected equal padding on all sides. Received a layer with more on one")
        pads.append(before)
    return tuple(pads)
