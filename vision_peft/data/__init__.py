"""Few-shot image classification data: sources (where pictures and labels come from) and the Lightning data module that serves them.

The sources are exported here, so that YAML can say `class_path: vision_peft.data.CsvSource`; none of them imports torch. The data
module is `vision_peft.data.fewshot_images.FewShotImages`, kept out of this file because it imports lightning.
"""

from vision_peft.data.class_subset import ClassSubset
from vision_peft.data.coop_split import CoopSplit
from vision_peft.data.csv_source import CsvSource
from vision_peft.data.digits import Digits
from vision_peft.data.fgvc_aircraft import FgvcAircraft
from vision_peft.data.image_folder import ImageFolder
from vision_peft.data.imagenet import ImageNet
from vision_peft.data.records import ImageSplits, Record
from vision_peft.data.source import Source
