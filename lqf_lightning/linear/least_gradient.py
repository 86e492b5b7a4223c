"""The point of least gradient among those that a descent has seen, on the way to its optimum."""

import math

from lqf_lightning.linear.conjugate_gradient import ConjugateGradient
from lqf_lightning.linear.metric import Tensors, dot
from lqf_lightning.linear.solution import Certificate


class LeastGradient:
    r"""Combines the points of conjugate gradients so that the gradient is as short as can be.

    Conjugate gradients make the error small, not the gradient, whose norm goes up and down; certificates are made of
    the gradient. It is affine in the weights, so on the line from the present combination s to the next point w,

    .. math:: s \leftarrow s + \eta (w - s), \qquad
        \eta = \frac{g_s \cdot M^{-1} (g_s - g_w)}{\lVert g_s - g_w \rVert_{M^{-1}}^2}

    has the shortest gradient, which is known without another pass over the data (minimal residual smoothing; Zhou and
    Walker, SIAM J. Sci. Comput. 15, 1994). The norm never rises. Without a preconditioner the combinations are the
    points of the conjugate residual method, the best that any method with these products has.

    Args:
        descent: The descent, its first gradient received.

    Attributes:
        movement: The combined dw by parameter name.
        gradient: Its gradient.

    Example:
        >>> import torch
        >>> from lqf_lightning.linear.problem import QuadraticProblem
        >>> rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.ones(2, 1), ridge=1.0)
        >>> descent = ConjugateGradient(problem, {"w": torch.zeros(2).double()})
        >>> descent.receive_gradient({"w": rows.T @ descent.residual[:, 0]})
        >>> least = LeastGradient(descent)
        >>> descent.receive_image((rows @ descent.direction["w"])[:, None])
        >>> descent.receive_gradient({"w": rows.T @ descent.residual[:, 0]})
        >>> least.update()
        >>> least.certificate.distance_bound < descent.certificate.distance_bound
        True
    """

    def __init__(self, descent: ConjugateGradient) -> None:
        self.descent = descent
        self.movement: Tensors = dict(descent.movement)
        self.gradient: Tensors = dict(descent.gradient)

    def update(self) -> None:
        """Take in the present point of the descent, whose gradient has been received."""
        descent, solve = self.descent, self.descent.metric.solve
        change = {name: entry - descent.gradient[name] for name, entry in self.gradient.items()}
        scaled = solve(change)
        length = dot(change, scaled)
        share = dot(self.gradient, scaled) / length if length > 0 else 1.0
        self.gradient = {name: entry - share * change[name] for name, entry in self.gradient.items()}
        self.movement = {
            name: entry + share * (descent.movement[name] - entry) for name, entry in self.movement.items()
        }

    @property
    def certificate(self) -> Certificate:
        """How far the combination is from the optimum; the objective is not computed."""
        norm = math.sqrt(max(0.0, dot(self.gradient, self.descent.metric.solve(self.gradient))))
        relative = norm / self.descent.reference if self.descent.reference > 0 else (math.inf if norm > 0 else 0.0)
        return Certificate(relative, norm / self.descent.problem.ridge, math.nan)
