"""What a sample or a representation tells: unique information, usable information, learning speed."""

from lqf_lightning.information.label_suspects import LabelSuspects as LabelSuspects
from lqf_lightning.information.label_suspects import label_suspects as label_suspects
from lqf_lightning.information.unique_information import function_information as function_information
from lqf_lightning.information.unique_information import langevin_information as langevin_information
from lqf_lightning.information.unique_information import weight_information as weight_information
